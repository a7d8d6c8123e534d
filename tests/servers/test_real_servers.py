"""`fuserl sample` on real servers that it starts itself, one of them killed in mid-request."""

import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fuserl_megatron.config.sample_sections import (
    LogprobsConfig,
    SampleConfig,
    SamplingConfig,
    ServerConfig,
    SourceConfig,
)
from fuserl_megatron.making.finished import finished_rows
from fuserl_megatron.making.logprobs import logprobs
from fuserl_megatron.making.sample import sample
from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model

pytestmark = pytest.mark.servers
VLLM = shutil.which(os.environ.get("FUSERL_TEST_VLLM", "vllm"))


@pytest.fixture
def model(tmp_path):
    """A tiny model whose generation config says that it samples."""
    directory = tmp_path / "model"
    shape = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=2)
    save_tiny_model(directory, scale=1.0, **shape)
    save_char_tokenizer(directory)
    (directory / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": 1}))
    return directory


def settings(model, tmp_path, server, num_prompts, n, in_flight):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}?"}) + "\n" for i in range(num_prompts)))
    source = SourceConfig(
        name="tiny",
        model=str(model),
        server=server,
        sampling=SamplingConfig(max_tokens=12, temperature=1.0),
        max_in_flight=in_flight,
    )
    return SampleConfig(prompts=(str(prompts),), output=str(tmp_path / "out"), n=n), source


def check_rows(config, expected):
    rows = list(finished_rows(Path(config.output) / "tiny"))
    assert len(rows) == len({row["key"] for row in rows}) == expected
    assert all(0 < row["tokens"] <= 12 and row["prompt_tokens"] > 10 for row in rows)
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    texts = {}
    for row in rows:
        texts.setdefault(row["prompt"], set()).add(row["response"])
    assert sum(map(len, texts.values())) > 1.5 * len(texts), "the answers to a prompt are the same"


def kill_when(part, rows, name):
    """Kill the process of that name below us once there are so many rows."""
    while not part.exists() or part.read_bytes().count(b"\n") < rows:
        time.sleep(0.05)
    found = [p for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline())]
    os.kill(found[0].pid, signal.SIGKILL)


@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="make test-servers installs fastapi")
def test_transformers_serve(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program = f"{sys.executable} -m transformers.cli.transformers serve {{model}} --port {{port}} --device cpu"
    server = ServerConfig(command=f"{program} --host 127.0.0.1")
    config, source = settings(model, tmp_path, server, 20, 2, 4)
    part = Path(config.output) / "tiny" / "part-00000.jsonl"
    killer = threading.Thread(target=kill_when, args=(part, 10, "transformers.cli"), daemon=True)
    killer.start()
    assert sample(config, [source]) == 0
    check_rows(config, 40)
    out = capfd.readouterr().out
    assert "prompt proved by its number of tokens alone" in out
    assert out.count("starting it again") == out.count("answers again") == 1


def vllm_server(monkeypatch, **options):
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    for name, value in (environment | offline).items():
        monkeypatch.setenv(name, value)
    command = ServerConfig().command.replace("vllm", VLLM, 1)
    options = {"max_model_len": 256, "max_num_seqs": 16, "enforce_eager": True} | options
    return ServerConfig(command=command, args=options)


@pytest.mark.skipif(VLLM is None, reason="make test-vllm installs vLLM, or name its program in FUSERL_TEST_VLLM")
def test_vllm_whose_engine_is_killed_twice(model, tmp_path, monkeypatch, capfd):
    config, source = settings(model, tmp_path, vllm_server(monkeypatch), 200, 2, 16)
    part = Path(config.output) / "tiny" / "part-00000.jsonl"

    def kill():
        for rows in (100, 250):
            kill_when(part, rows, "EngineCore")
            time.sleep(5)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert sample(config, [source]) == 0
    check_rows(config, 400)
    out = capfd.readouterr().out
    assert "prompt proved as the source's tokenizer has it" in out
    assert out.count("starting it again") == out.count("answers again") == 2


@pytest.mark.skipif(VLLM is None, reason="make test-vllm installs vLLM, or name its program in FUSERL_TEST_VLLM")
def test_vllm_gives_the_log_probabilities_of_transformers(model, tmp_path, monkeypatch, capfd):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["x", "hello there", "a longer answer. " * 4, " begins and ends with a blank "]
    answers = [{"prompt": f"question {i % 3}?", "source": "other", "response": f"{t}{i}"} for i, t in enumerate(texts)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    server = vllm_server(monkeypatch, dtype="float32")
    chat = SourceConfig(name="chat", model=str(model), server=server, system="Be brief.")
    config = LogprobsConfig(samples=(str(tmp_path / "answers.jsonl"),), output=str(tmp_path / "logps"), top_k=3)
    base = SourceConfig(name="base", model=str(model), server=server, kind="completion", bos="none")
    assert logprobs(config, [chat, base]) == 0
    assert capfd.readouterr().out.count("log-probabilities proved") == 2
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).float()
    for name in ("chat", "base"):
        for answer, row in zip(answers, finished_rows(tmp_path / "logps" / name), strict=True):
            if name == "base":
                prompt = f"Question: {answer['prompt']}\nAnswer:"
                start, ids = (
                    len(tokenizer(prompt)["input_ids"]),
                    tokenizer(f"{prompt} {answer['response']}")["input_ids"],
                )
            else:
                turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": answer["prompt"]}]
                whole = [*turns, {"role": "assistant", "content": answer["response"]}]
                render = tokenizer.apply_chat_template
                prompt = render(turns, tokenize=False, add_generation_prompt=True)
                start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
                ids = tokenizer(render(whole, tokenize=False), add_special_tokens=False)["input_ids"]
                ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]  # to the token that ends the turn
            with torch.no_grad():
                logps = network(torch.tensor([ids])).logits[0].log_softmax(-1)
            own = [logps[i - 1, ids[i]].item() for i in range(start, len(ids))]
            assert row["tokens"] == len(own) and row["mean_logp"] == pytest.approx(sum(own) / len(own), abs=1e-3)
            assert row["token_ids"] == ids[start:]
            best = logps[start - 1 : -1].topk(3).values.tolist()
            assert [[value for _, value in top] for top in row["top"]] == [pytest.approx(b, abs=1e-3) for b in best]
