"""`fuserl score` on a real vLLM: the same rewards as in this process, from both interfaces."""

import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from fuserl_megatron.config.score_sections import EndpointReward, ModelReward, ScoreConfig
from fuserl_megatron.making.score import score
from fuserl_megatron.testing.tiny import save_tiny_reward_model
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.ports import free_port

pytestmark = pytest.mark.servers
VLLM = shutil.which(os.environ.get("FUSERL_TEST_VLLM", "vllm"))
READY_S = 900


@pytest.fixture
def server(tmp_path):
    """(address, directory) of a reward model whose padding token ends every conversation."""
    model = tmp_path / "model"
    shape = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    save_tiny_reward_model(model, scale=3.0, **shape)
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    port = free_port()
    words = [VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "rm"]
    words += ["--runner", "pooling", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    with open(tmp_path / "vllm.log", "wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | environment)
    try:
        started = time.monotonic()
        while not is_up(port):
            assert process.poll() is None and time.monotonic() - started < READY_S, (tmp_path / "vllm.log").read_text()
            time.sleep(1)
        yield f"http://127.0.0.1:{port}", model
    finally:
        process.terminate()
        process.wait(60)


def is_up(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


@pytest.mark.skipif(VLLM is None, reason="make test-vllm installs vLLM, or name its program in FUSERL_TEST_VLLM")
def test_vllm_gives_the_rewards_of_this_process(server, tmp_path):
    url, model = server
    texts = ["x" * 7 * (i % 25) + f" answer {i}" for i in range(60)] + ["too long " * 50]
    rows = [{"prompt": f"question {i}?", "source": "a", "response": text} for i, text in enumerate(texts)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = {
        "here": ModelReward(model=str(model), dtype="float32", max_length=256),
        "classify": EndpointReward(url=(url,)),
        "pooling": EndpointReward(url=(url,), api="pooling"),
    }
    config = ScoreConfig(samples=(str(tmp_path / "answers.jsonl"),), output=str(tmp_path / "out"), rewards=(*rewards,))
    report = score(config, rewards)
    found = [json.loads(line)["rewards"] for line in Path(config.output, "records.jsonl").read_text().splitlines()]
    assert len(found) == 60 and report["left_out"] == {"failed": 1}
    for name in ("classify", "pooling"):
        assert [row[name] for row in found] == pytest.approx([row["here"] for row in found], abs=1e-4)
    assert max(row["here"] for row in found) - min(row["here"] for row in found) > 0.1
    with pytest.raises(UserError, match="the server has rm"):
        score(ScoreConfig(**vars(config) | {"rewards": ("x",)}), {"x": EndpointReward(url=(url,), model="rn")})
