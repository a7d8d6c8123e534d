"""Where the ranks of a run meet: the store of torch.distributed, listening no wider than it must.

torch's own store listens on every interface and asks nobody who he is: whoever reaches it can stop a run, or stand in
for a rank (objects that ranks exchange are pickles). Ranks of one machine therefore meet on 127.0.0.1, ranks of several
on the address of rank 0's host that MASTER_ADDR names. Under torchrun the store is its agent's.
"""

import datetime
import os
import re
import socket
from typing import Any

import torch.distributed as dist

from fuserl_megatron.util.errors import UserError


def first_host(nodelist: str) -> str:
    """The first host of SLURM's short form: `gpu[03-05,9],login1` begins with gpu03. Empty for an empty list."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")


def rendezvous_from_slurm() -> None:
    """Srun gives ranks as SLURM_*; torch.distributed reads RANK, WORLD_SIZE and MASTER_*."""
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    # not SLURM_LAUNCH_NODE_IPADDR: that is where srun was typed, which may be a login node
    env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", "")) or "127.0.0.1")
    # one port a job, so that two jobs on a node do not meet
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def start_process_group(backend: str, timeout: datetime.timedelta) -> None:
    """torch.distributed's default group over the ranks that the environment tells of; one process alone without any.

    Raises:
        UserError: rank 0 cannot listen where it should, or nothing says where that is.
    """
    env, rank, world = os.environ, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:  # no port that another process may take first
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    one_machine = env.get("LOCAL_WORLD_SIZE") == str(world)
    if "SLURM_PROCID" in env and "LOCAL_WORLD_SIZE" not in env:
        one_machine = env.get("SLURM_STEP_NUM_NODES") == "1"
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not env.get(name):
            raise UserError(f"{name} is not set: with RANK and WORLD_SIZE={world} it says where the ranks meet.")
    address, port = "127.0.0.1" if one_machine else env["MASTER_ADDR"], int(env["MASTER_PORT"])
    if one_machine and any(name == "lo" for _, name in socket.if_nameindex()):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    listening = _listen(address, port).detach() if rank == 0 else None
    store = dist.TCPStore(address, port, world, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listening)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _listen(address: str, port: int) -> socket.socket:
    """A socket that listens on the interface of this address; where that is a loopback one (Debian gives a host's own
    name 127.0.1.1), other machines could not reach it, so it listens on all of them."""
    try:
        found: Any = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        family, kind, protocol, _, place = found
        if address != "127.0.0.1" and (place[0].startswith("127.") or place[0] == "::1"):
            place = ("", port)
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(4096)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={address} MASTER_PORT={port}: rank 0 cannot listen there ({error.strerror or error}): "
            "MASTER_ADDR must be an address of the host of rank 0, MASTER_PORT free."
        ) from None
    return listening
