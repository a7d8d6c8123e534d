"""Mistakes as a user makes them, through the real command line: one clear line, exit code 2, nothing half-written
left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RECORD = {"prompt": "q", "source": "s", "response": "right", "reward": 0.5}


def fuserl(*arguments, cwd, timeout=600):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "fuserl_megatron.cli", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def refused(done, *words):
    """Exit code 2 and one line on stderr that has all the words."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("fuserl: error:")]
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model

    root = tmp_path_factory.mktemp("workplace")
    save_tiny_model(root / "model", num_key_value_heads=2)
    save_char_tokenizer(root / "model")
    rows = [
        dict(RECORD, prompt=f"question {p}", source=s, response="abc" * (n + 1), reward=n / 4)
        for p in range(6)
        for s in ("a", "b")
        for n in range(2)
    ]
    save_tiny_model(root / "copy", seed=5, num_key_value_heads=2)
    save_char_tokenizer(root / "copy")
    (root / "good.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = fuserl("build", "inputs=[good.jsonl]", "output=fused", "tokenizer=model", "reward_temperature=0.1", cwd=root)
    assert done.returncode == 0, done.stderr
    return root


BAD_RECORDS = {
    "malformed JSON": ('{"prompt": "q", "source"', ["bad.jsonl:2", "JSON"]),
    "missing field": (
        json.dumps({k: v for k, v in RECORD.items() if k != "reward"}),
        ["bad.jsonl:2", "reward", "missing"],
    ),
    "NaN reward": (json.dumps(RECORD | {"reward": float("nan")}), ["bad.jsonl:2", "reward"]),
    "empty response": (json.dumps(RECORD | {"response": ""}), ["bad.jsonl:2", "response", "empty"]),
    "prompt too long": (json.dumps(RECORD | {"prompt": "x" * 400}), ["bad.jsonl:2", "prompt", "max_length"]),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_stops_with_file_and_line(workplace, tmp_path, name):
    text, words = BAD_RECORDS[name]
    (tmp_path / "bad.jsonl").write_text(json.dumps(RECORD) + "\n" + text + "\n")
    settings = [
        "inputs=[bad.jsonl]",
        "output=out",
        f"tokenizer={workplace / 'model'}",
        "reward_temperature=0.1",
        "max_length=128",
    ]
    refused(fuserl("build", *settings, cwd=tmp_path), *words, "on_bad_record=skip")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl"]
    done = fuserl("build", *settings, "on_bad_record=skip", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 1


TRAIN = [
    "model.path=model",
    "data.path=fused",
    "trainer=cpu",
    "data.seq_length=160",
    "data.global_batch_size=4",
    "data.micro_batch_size=2",
]
BAD_RUNS = {
    "unknown key": (["optim.learning_rate=1"], ["optim.learning_rate"]),
    "TP does not divide": (["model.tensor_model_parallel_size=4"], ["tensor_model_parallel_size=4", "key/value heads"]),
    "not a model": (["model.path=fused"], ["fused", "config.json"]),
    "no such directory": (["model.path=nowhere"], ["nowhere"]),
    "not a data set": (["data.path=model"], ["model", "fuserl build"]),
    "row too short": (["data.seq_length=16"], ["data.seq_length"]),
    "unused option": (["objective.beta=1"], ["objective.beta"]),
    "fp8 or other precision": (["trainer.precision=fp8"], ["trainer.precision"]),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_wrong_setting_is_refused_before_anything_is_written(workplace, tmp_path, name):
    changes, words = BAD_RUNS[name]
    done = fuserl("train", *TRAIN, f"run.results_dir={tmp_path / 'run'}", *changes, cwd=workplace)
    refused(done, *words)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_while_building(workplace, small_disk):
    rows = [dict(RECORD, prompt=f"{p}", response="abcdefgh" * 40, source=str(s)) for p in range(60) for s in range(8)]
    (workplace / "large.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = fuserl(
        "build",
        "inputs=[large.jsonl]",
        f"output={small_disk / 'out'}",
        "tokenizer=model",
        "reward_temperature=0.1",
        cwd=workplace,
    )
    refused(done, str(small_disk), "space left on the disk")
    assert list(small_disk.iterdir()) == []


def test_full_disk_while_saving_ends_with_code_1_and_leaves_nothing_half_written(workplace, small_disk):
    done = fuserl(
        "train",
        *TRAIN,
        "trainer.max_steps=2",
        f"run.results_dir={small_disk / 'run'}",
        "exp_manager.create_tensorboard_logger=false",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
        "exp_manager.checkpoint_callback_params.save_retries=1",
        cwd=workplace,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    for step in (1, 2):  # training goes on after the first one failed
        failed = [line for line in lines if f"iter_000000{step}: not written" in line]
        assert [line.rsplit("; ", 1)[1] for line in failed] == ["try 1 of 2", "try 2 of 2"]
        assert any(f"no checkpoint of step {step}: 2 tries failed" in line for line in lines)
        assert any(line.startswith(f"step {step}/2") for line in lines)
    assert any("the last checkpoint, of step 2, could not be written" in line for line in lines)
    assert not list((small_disk / "run" / "checkpoints").glob("*iter*"))
    assert not (small_disk / "run" / "hf").exists()


def test_the_same_settings_work(workplace, tmp_path):
    """The control: what the refusals above change is the only thing wrong with those runs."""
    done = fuserl("train", *TRAIN, "trainer.max_steps=1", f"run.results_dir={tmp_path / 'run'}", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
    shutil.rmtree(tmp_path / "run" / "hf")
    pointer = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    pointer.write_text("garbage")
    left = pointer.with_name(".iter_0000001.ab.partial")  # as a run leaves it that is killed in its last save
    left.mkdir()
    again = fuserl("train", *TRAIN, "trainer.max_steps=1", f"run.results_dir={tmp_path / 'run'}", cwd=workplace)
    assert again.returncode == 0 and Path(tmp_path / "run" / "hf" / "config.json").is_file()
    assert f"{pointer} says 'garbage', which is no number. Step 1 is used instead" in again.stdout
    assert not left.exists()
    other = fuserl(
        "train", *TRAIN, "trainer.max_steps=1", "run.seed=7", f"run.results_dir={tmp_path / 'run'}", cwd=workplace
    )
    refused(other, "run.seed=1234", "run.seed=7")
    before = (tmp_path / "run" / "config.yaml").read_text()
    other = fuserl(
        "train", *TRAIN, "trainer.max_steps=1", f"run.results_dir={tmp_path / 'run'}", "model.path=copy", cwd=workplace
    )
    refused(other, "model.path")
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    (tmp_path / "run" / "checkpoints" / "iter_0000001" / "common.pt").write_bytes(b"")
    lost = fuserl("train", *TRAIN, "trainer.max_steps=1", f"run.results_dir={tmp_path / 'run'}", cwd=workplace)
    refused(lost, "holds no whole checkpoint (", "iter_0000001: common.pt has 0 bytes instead of", "put one back")


@pytest.mark.parametrize(
    "change",
    [
        "optim.lr=1e-4",
        "objective.nll_reduction=token_sum",
        "data.reward_temperature=5",
        "run.seed=7",
        "model.path=copy",
    ],
)
def test_what_changes_the_numbers_changes_the_identity(workplace, monkeypatch, change):
    """In this process, for the command line above refuses whatever differs here."""
    from fuserl_megatron.config.load import load_config
    from fuserl_megatron.data.dataset import FusedDataset
    from fuserl_megatron.train.resume import run_identity

    monkeypatch.chdir(workplace)

    def identity(*overrides):
        config = load_config("train", [*TRAIN, *overrides])
        dataset = FusedDataset(config.data.path)
        temperature = config.data.reward_temperature
        return run_identity(config, dataset, 0.1 if temperature is None else temperature, 1)

    assert identity() == identity("trainer.log_every_n_steps=3")
    different = {key for key, value in identity(change).items() if identity()[key] != value}
    assert len(different) == 1
