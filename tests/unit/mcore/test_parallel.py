"""Where a rank stands, from what the launcher says: the rendezvous under srun, the GPU of each rank."""

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fuserl_megatron.launch import ranks
from fuserl_megatron.mcore import parallel
from fuserl_megatron.runtime import rendezvous
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.ports import reserved_port


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Changes to it, also those of the code under test, end with the test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        kept.pop(name, None)
    monkeypatch.setattr(os, "environ", kept)
    return kept


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("login1", "login1"),
        ("a-7.cluster,b2", "a-7.cluster"),
        ("gpu[03-05,9]", "gpu03"),
        ("gpu[7,01-04],cpu1", "gpu7"),
        ("r[2-3]n[01-16],x", "r2n01"),
        ("", ""),
    ],
)
def test_first_host(nodelist, first):
    assert rendezvous.first_host(nodelist) == first


SRUN = dict(
    SLURM_PROCID="5",
    SLURM_NTASKS="8",
    SLURM_LOCALID="1",
    SLURM_JOB_ID="20007",
    SLURM_STEP_NODELIST="gpu[03-06]",
    SLURM_LAUNCH_NODE_IPADDR="10.0.0.1",
)


def test_srun_s_ranks_meet_on_the_first_node(environment):
    environment.update(SRUN)
    rendezvous.rendezvous_from_slurm()
    expected = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="gpu03", MASTER_PORT="20007")
    assert environment.items() >= expected.items()


def test_a_rendezvous_that_is_set_is_kept(environment):
    environment.update(SRUN, MASTER_ADDR="ib0.gpu03", MASTER_PORT="1234")
    rendezvous.rendezvous_from_slurm()
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("ib0.gpu03", "1234")


@pytest.mark.parametrize(
    ("visible", "given", "expected"),
    [
        (8, {}, 0),
        (8, {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 3),
        (8, {"SLURM_LOCALID": "5"}, 5),
        (1, {"SLURM_LOCALID": "5"}, 0),  # srun --gpus-per-task=1
        (1, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, None),  # fuserl train --nproc 2 where there is one GPU
        (2, {"SLURM_LOCALID": "2"}, None),
    ],
)
def test_the_gpu_of_a_rank(environment, monkeypatch, visible, given, expected):
    """What torch would say where GPUs are; nothing else of it is replaced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    environment.update(given)
    if expected is None:
        with pytest.raises(UserError, match=f"start at most {visible} ranks here") as error:
            parallel.choose_device("auto")
        assert "\n" not in str(error.value)
    else:
        assert parallel.choose_device("auto") == torch.device("cuda", expected)


def listening_addresses(pid: int) -> set[str]:
    """Local addresses on which a process listens, in /proc/net's hexadecimal form, without the ports."""
    own = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:
                found.add(words[1].partition(":")[0])
    return found


RANK = """
import datetime, sys, torch, torch.distributed as dist
from fuserl_megatron.runtime.rendezvous import start_process_group
start_process_group("gloo", datetime.timedelta(seconds=60))
dist.all_reduce(torch.ones(1))
print("met", flush=True)
sys.stdin.read()
"""


def test_ranks_of_one_machine_listen_on_the_loopback_interface_alone(environment):
    """A store on every interface lets whoever reaches the machine stop a run."""
    with reserved_port() as reserved:
        port = reserved.getsockname()[1]
        started = [
            subprocess.Popen(
                [sys.executable, "-c", RANK],
                env=ranks.rank_environment(rank, 2, port, environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(2)
        ]
    try:
        assert [rank.stdout.readline() for rank in started] == [b"met\n"] * 2
        assert [listening_addresses(rank.pid) for rank in started] == [{"0100007F"}] * 2
    finally:
        for rank in started:
            rank.communicate()
            rank.wait()


def test_an_address_of_another_host_is_one_line():
    with pytest.raises(UserError, match=r"MASTER_ADDR=192\.0\.2\.7 MASTER_PORT=0: rank 0 cannot listen there"):
        rendezvous._listen("192.0.2.7", 0)


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_ranks_that_nobody_told_where_to_meet_are_one_line(environment, name):
    environment.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    del environment[name]
    with pytest.raises(UserError, match=f"{name} is not set"):
        rendezvous.start_process_group("gloo", datetime.timedelta(seconds=1))
