"""A canary in every usual credential's variable: after building, training, launching and failing, no file and no output
has it."""

import json
import os
import subprocess
import sys

from fuserl_megatron.cli import main

CANARY = "canary-7f3a91c4e2d8"
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY")


def test_no_credential_is_written_or_said(tmp_path, monkeypatch, capfd):
    from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model

    save_tiny_model(tmp_path / "model", num_key_value_heads=2)
    save_char_tokenizer(tmp_path / "model")
    rows = [
        dict(prompt=f"question {p}", source=s, response="abc" * (n + 1), reward=n / 4)
        for p in range(6)
        for s in ("a", "b")
        for n in range(2)
    ]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    environment = os.environ | {name: f"{CANARY}-{name}" for name in NAMES} | {"OMP_NUM_THREADS": "1"}
    environment |= {"TMPDIR": str(tmp_path)}  # what only passes through is looked at, too

    def run(code, *words, **more):
        command = [sys.executable, "-m", "fuserl_megatron.cli", *words]
        options = dict(cwd=tmp_path, env=environment | more, text=True, timeout=600)
        done = subprocess.run(command, capture_output=True, **options)
        assert done.returncode == code, done.stdout + done.stderr
        assert CANARY not in done.stdout + done.stderr, words
        return done.stdout + done.stderr

    build = ["inputs=[good.jsonl]", "tokenizer=model", "reward_temperature=0.1"]
    train = ["trainer=cpu", "data.seq_length=160", "data.global_batch_size=4", "data.micro_batch_size=2"]
    train += ["trainer.max_steps=1", "model.path=model", "data.path=fused"]
    run(0, "build", *build, "output=fused")
    run(0, "train", *train, "run.results_dir=run")
    launch = [
        "target=model",
        "stages=[build_sft,fusesft]",
        "run.results_dir=chain",
        *(f"build_sft.{w}" for w in build[:1]),
    ]
    launch += ["build_sft.reward_temperature=0.1", *(f"fusesft.{w}" for w in train[:5])]
    for cluster in ("local", "slurm"):
        assert "fusesft" in run(0, "launch", "--dry-run", f"cluster={cluster}", *launch)
    # every way of writing one into a configuration or a path is refused, and the refusal names the variable alone
    typed = f"{CANARY}-HF_TOKEN"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", typed)
    for name in ("RANK", "WORLD_SIZE", "FUSERL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    for words in (
        ["train", *train, "run.name=${oc.env:HF_TOKEN}"],
        ["train", *train, f"run.name={typed}"],
        ["train", *train, f"run.name={typed},2"],
        ["train", *train, f"data.path={typed}"],
        ["train", *train, f"optim.lr={typed}"],
        ["train", *train, f"{typed}=1"],
        ["build", *build, "output=o", f"sources=[{typed}]"],
        ["launch", *launch, f"cluster.env=[HF_TOKEN={typed}]"],
    ):
        assert main(words) == 2
        said = "".join(capfd.readouterr())
        assert "$HF_TOKEN" in said and CANARY not in said, words
    found = [str(f) for f in tmp_path.rglob("*") if f.is_file() and CANARY.encode() in f.read_bytes()]
    assert not found
    written = {f.name for f in (tmp_path / "run").rglob("*") if f.is_file()}
    assert {"config.yaml", "metrics.jsonl", "README.md", "model.safetensors"} <= written
    # the control: the search finds one that is there
    (tmp_path / "planted").write_text(f"run: {{name: {typed}}}\n")
    assert [f.name for f in tmp_path.rglob("*") if f.is_file() and CANARY.encode() in f.read_bytes()] == ["planted"]
