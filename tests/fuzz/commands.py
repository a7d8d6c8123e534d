"""Command lines, overrides and yaml files with something wrong in them, through `fuserl` in this process.

Every key of every command's schema x odd values, groups, words that are no overrides, yaml roots of somebody else,
variables of a launcher. Right is: exit code 0, or 2 with one line; a planted credential is never printed.
"""

import contextlib
import io
import json
import os
import random
import tempfile
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported: a word may be the name of a data set there

from common import Report, Wrong, attempt, for_a_while, main

from fuserl_megatron import cli
from fuserl_megatron.config.keys import all_keys
from fuserl_megatron.config.launch_sections import LaunchConfig
from fuserl_megatron.config.schema import BuildConfig, Config
from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model
from fuserl_megatron.util.errors import UserError

SECRET = "canary-5d1f9a"
VALUES = [
    *("null", "true", "1", "0", "-1", "3.5", "1e400", "nan", "inf", "''", '""', "x", "[]", "[1]", "[x,y]", "{}"),
    *("{a: 1}", "1,2", "range(3)", "${run.name}", "${oc.env:HF_TOKEN}", "${x", "???", "9" * 5000, "[" * 900, "a b"),
    *("a=b", "'", "\\", "é", "²", "\x1b[31m", "a\nb", "/", "..", "/dev/null", "~", "%s", "{0}", "[/x]", "100%"),
    *("0x10", "1_000", "on", "off"),
]  # fmt: skip
WORDS = [
    *("--nproc", "--nproc=0", "--nproc=x", "-x", "--", "", "=", "=1", "a", "a.b.c=1", "+run.x=1", "~run.name"),
    *("++a=1", "hydra.run.dir=x", "hydra/launcher=x", "recipe=nope", "optim=", "--config-name=x"),
    *("--config-dir=/nope", "\udcff"),
]  # fmt: skip
YAMLS = [
    *("", "a", "[]", "3", "run: 5", "run: [1]", "run: {name: [1]}", "run: &a {name: *a}", "[" * 600, "{a: " * 300),
    *("!!python/object/apply:os.system [touch P]", "run: {name: !!binary aGk=}", "defaults: [nope]", "defaults: 3"),
    *("defaults: [train, _self_]\noptim: {lr: 1e-4}", "run: {name: ${oc.env:HF_TOKEN}}", "? a\n: b", "\x00", "\t"),
    *("run: {name: ${run.name}}", "%"),
]  # fmt: skip
SMALL = ["data.seq_length=160", "data.global_batch_size=2", "data.micro_batch_size=2"]
VARIABLES = {
    "RANK": ["0", "x", "-1", "", "9" * 5000],
    "WORLD_SIZE": ["0", "x", "", "1", "-2", "1.5"],
    "LOCAL_RANK": ["x", ""],
    "SLURM_STEP_NUM_TASKS": ["", "x", "0", "2"],
    "SLURM_PROCID": ["", "x", "0"],
}


def line(rng: random.Random, folder: Path) -> list[str]:
    """The words of one command that runs nothing but checks."""
    command, schema = rng.choice([("train", Config), ("build", BuildConfig), ("launch", LaunchConfig)])
    good = {
        "train": ["--dry-run", f"model.path={folder}/model", f"data.path={folder}/data", "trainer=cpu", *SMALL],
        "build": [f"inputs=[{folder}/nope.jsonl]", f"output={folder}/out", f"tokenizer={folder}/model"],
        "launch": ["--dry-run", f"target={folder}/model", "stages=[evaluate]", "evaluate.command=true"],
    }[command]
    keys, words = all_keys(schema), [command, *good]
    if command == "launch":
        words += [f"cluster={rng.choice(['local', 'slurm'])}"]
        keys = [*keys, *(f"{stage}.{key}" for stage in ("fusesft", "train") for key in all_keys(Config))]
    for _ in range(rng.choice([1, 1, 2, 4])):
        words.append(rng.choice(WORDS) if rng.random() < 0.15 else f"{rng.choice(keys)}={rng.choice(VALUES)}")
    if rng.random() < 0.2:
        file = folder / rng.choice(["a.yaml", "a=b.yaml", "a,b.yaml", "[a].yaml", "a b.yaml"])
        file.write_text(rng.choice(YAMLS))
        words += ["--config-name", str(file)]
    return words


def run(seed: int, seconds: float, cases: int | None = None) -> Report:
    """Type commands until the time or the cases are over."""
    report = Report("commands", seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / "model", num_key_value_heads=2)
        save_char_tokenizer(folder / "model")
        rows = [{"prompt": p, "source": s, "response": f"{p} {s}", "reward": 0.5} for p in "pqr" for s in "ab"]
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = [f"inputs=[{folder}/in.jsonl]", f"output={folder}/data", f"tokenizer={folder}/model"]
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main(["build", *words, "reward_temperature=0.1"]) == 0
        before = {*folder.rglob("*")}
        for number, rng in enumerate(for_a_while(seconds, cases, seed)):
            words, variables = line(rng, folder), {"HF_TOKEN": SECRET}
            if rng.random() < 0.1:
                variables |= {k: rng.choice(v) for k, v in VARIABLES.items() if rng.random() < 0.5}

            def case(words: list[str] = words, variables: dict[str, str] = variables) -> None:
                out, err = io.StringIO(), io.StringIO()
                kept = {k: v for k, v in os.environ.items() if k not in VARIABLES}
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    with mock.patch.dict(os.environ, kept | variables, clear=True), contextlib.chdir(folder):
                        try:
                            code = cli.main(words)
                        except SystemExit as end:  # argparse: its usage, and one line
                            code = end.code
                            err = io.StringIO(err.getvalue().splitlines()[-1] + "\n")
                said = out.getvalue() + err.getvalue()
                if SECRET in said:
                    raise Wrong("the credential was printed")
                if code not in (0, 2):
                    raise RuntimeError(f"exit code {code}: {err.getvalue()}")
                if code and (err.getvalue().count("\n") != 1 or not err.getvalue().strip().isprintable()):
                    raise Wrong(f"not one printable line: {err.getvalue()!r}")
                left = sorted(path.name for path in {*folder.rglob("*")} - before if path.suffix != ".yaml")
                if left:
                    raise Wrong(f"left over: {left}")
                if code:
                    raise UserError(err.getvalue().strip())

            attempt(report, f"case {number}, {words!r:.300}", case)
    return report


if __name__ == "__main__":
    main(run)
