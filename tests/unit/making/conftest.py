import json

import pytest
from stub_server import Stub

from fuserl_megatron.config.sample_sections import SampleConfig, SamplingConfig, SourceConfig
from fuserl_megatron.testing.tiny import save_tiny_reward_model


@pytest.fixture(scope="module")
def reward_model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward_model")
    save_tiny_reward_model(directory)
    return str(directory)


@pytest.fixture
def stub():
    with Stub(seed=1).running() as running:
        yield running


@pytest.fixture
def prompts(tmp_path):
    """A function that writes a prompts file of some lines."""

    def write(count, name="prompts.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps({"prompt": f"question {i}", "meta": {"i": i}}) + "\n" for i in range(count)))
        return str(file)

    return write


@pytest.fixture
def settings(tmp_path, stub, prompts):
    """A function that gives (SampleConfig, SourceConfig) for the stub."""

    def make(count=20, n=2, source=None, sampling=None, **run):
        sampling = SamplingConfig(**({"max_tokens": 100} | (sampling or {})))
        own = {"name": "a", "model": "m", "url": (stub.url,), "sampling": sampling} | (source or {})
        run = {"prompts": (prompts(count),), "output": str(tmp_path / "out"), "n": n, "grace": 5.0} | run
        return SampleConfig(**run), SourceConfig(**own)

    return make
