"""Where a rank stands, from what the launcher says: the rendezvous under srun, the GPU of each rank."""

import os

import pytest
import torch

from fuserl_megatron.config.schema import UserError
from fuserl_megatron.mcore import parallel


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
    assert parallel.first_host(nodelist) == first


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
    parallel._rendezvous_from_slurm()
    expected = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="gpu03", MASTER_PORT="20007")
    assert environment.items() >= expected.items()


def test_a_rendezvous_that_is_set_is_kept(environment):
    environment.update(SRUN, MASTER_ADDR="ib0.gpu03", MASTER_PORT="1234")
    parallel._rendezvous_from_slurm()
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
