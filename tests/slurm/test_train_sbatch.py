"""slurm/train.sbatch on a real SLURM: two nodes, one rank on each, trained to the end; a mistake ends as one line."""

import json
import os
import sys
from pathlib import Path

import pytest
from cluster import Cluster, why_not

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def submit(cluster, case, results, *settings):
    # the nodes of this cluster are one host: its loopback is how they reach each other
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    exported = ",".join(["ALL", *(f"{k}={v}" for k, v in environment.items())])
    job = cluster.run(
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--export={exported}",
        f"--output={results}.log",
        str(ROOT / "slurm" / "train.sbatch"),
        "trainer=cpu",
        f"model.path={case['policy']}",
        f"data.path={case['data']}",
        "model.tensor_model_parallel_size=2",
        "data.seq_length=160",
        "data.micro_batch_size=2",
        "data.global_batch_size=4",
        f"run.results_dir={results}",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
        *settings,
    )
    state = cluster.wait(job)
    return state, Path(f"{results}.log").read_text()


def test_two_nodes_train_and_a_mistake_is_one_line(tmp_path):
    from fusion_case import make_case

    case = make_case(tmp_path)
    results = tmp_path / "run"
    with Cluster(tmp_path / "slurm") as cluster:
        state, log = submit(cluster, case, results, "trainer.max_steps=4", "trainer.max_epochs=null")
        assert state == "COMPLETED", log
        assert "2 ranks on n[1-2]" in log
        steps = [json.loads(line)["step"] for line in (results / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4]
        assert (results / "hf" / "model.safetensors").is_file()
        # a user's mistake ends the job as failed, with one clear line in its log
        state, log = submit(cluster, case, tmp_path / "bad", "optim.lrr=1")
        assert state == "FAILED"
        assert "optim.lrr: no such key" in log and "Traceback" not in log
