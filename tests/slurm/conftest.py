import sys
from pathlib import Path

import pytest
from cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two nodes, for all tests of this folder; this process's environment is a user's on a login node."""
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as running, pytest.MonkeyPatch.context() as patch:
        # the nodes are one host: its loopback is how they reach each other
        settings = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        settings["PATH"] = f"{Path(sys.executable).parent}:{running.environment['PATH']}"
        running.environment |= settings
        for name in ("SLURM_CONF", *settings):
            patch.setenv(name, running.environment[name])
        yield running


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """Paths of a tiny model, its tokenizer, a data set, and the records it was built from."""
    from fusion_case import make_case

    folder = tmp_path_factory.mktemp("case")
    return make_case(folder) | {"records": str(folder / "records.jsonl")}


@pytest.fixture
def settings(case):
    """Of `fuserl train` for that model."""
    return [
        "trainer=cpu",
        "trainer.max_epochs=null",
        "data.seq_length=160",
        "data.micro_batch_size=2",
        "data.global_batch_size=4",
    ]
