"""Every command that --help, README and docs tell people to type, typed: on a tiny model under the names they use.

Ranks are not started (other tests do that): `train` and `launch` get --dry-run, of `evaluate` and `parity` all that
comes before the ranks runs. `verify`, `doctor` and `demo` are parsed only; they have
tests of their own.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from fuserl_megatron.cli import main
from fuserl_megatron.cli.app import build_parser
from fuserl_megatron.launch import ranks

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["", "build", "train", "launch", "evaluate", "parity", "convert", "verify", "nemo-config", "doctor", "demo"]
COMMANDS += ["convert hf-to-megatron", "convert megatron-to-hf"]
PAGES = [ROOT / "README.md", ROOT / "slurm" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def help_of(command):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    return out.getvalue()


def examples(text):
    """Lines that begin with fuserl and have settings or options, continuations joined, remarks taken off."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [re.split(r"\s+#\s", line.strip())[0] for line in lines if re.match(r"^ {2,8}fuserl [a-z-]+( \S|$)", line)]


FROM_HELP = sorted({line for command in COMMANDS for line in examples(help_of(command)) if "COMMAND" not in line})
FROM_PAGES = sorted({line for page in PAGES for line in examples(page.read_text()) if "FILE" not in line})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory in which all the names exist."""
    from fuserl_megatron.config.schema import BuildConfig
    from fuserl_megatron.convert.offline import hf_to_megatron
    from fuserl_megatron.records.build import build
    from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model

    root = tmp_path_factory.mktemp("examples")
    target = root / "models" / "target"
    save_tiny_model(target, max_position_embeddings=4096, num_key_value_heads=8)
    save_char_tokenizer(target)
    models = [
        "models/small",
        "models/Llama-3.1-8B-Instruct",
        "models/Llama-3.1-70B-Instruct",
        "runs/fusesft/hf",
        "runs/fusepo/hf",
        "runs/sft/hf",
    ]
    for name in (*models, "runs/llama31_8b_fusesft/hf"):
        shutil.copytree(target, root / name)
    records = [
        dict(prompt=f"p{p}", source=s, response=f"{s}{n}", reward=n + 0.1 * ((p + (s == "b")) % 3))
        for p in range(8)
        for s in "ab"
        for n in (0, 1)
    ]
    text = "".join(json.dumps(r) + "\n" for r in records)
    for name in ("scored", "a", "b", "ultrafeedback_part1", "ultrafeedback_part2", "part1", "part2", "heldout"):
        (root / f"{name}.jsonl").write_text(text)
    scored = root / "runs" / "x" / "scored"  # as `fuserl score` leaves it
    scored.mkdir(parents=True)
    (scored / "records.jsonl").write_text(text)
    (scored / "done.json").write_text(json.dumps({"format": "fuserl scored responses", "bytes": len(text)}))
    shutil.copytree(scored, root / "scored")
    for name in ("qwen", "llama"):
        (root / f"{name}.yaml").write_text(f"model: org/{name}\nurl: http://127.0.0.1:1/v1\n")
    for name in ("fusesft", "fusepo"):
        (root / "runs" / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (root / "docs").mkdir()
    ratings = [dict(question=f"p{p}", answer={"text": "x"}, scores=[{"overall": p}], judge="j") for p in range(4)]
    (root / "ratings.json").write_text(json.dumps(ratings))
    (root / "sft").mkdir()
    chats = [{"messages": [{"role": r, "content": f"{r}{p}"} for r in ("user", "assistant")]} for p in range(4)]
    (root / "sft" / "llama70b.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.Table.from_pylist(records), root / "part-1.parquet")
    for name in ("fused", "fused_po", "heldout"):
        settings = dict(inputs=(str(root / "scored.jsonl"),), output=str(root / name), tokenizer=str(target))
        build(BuildConfig(**settings, reward_temperature=0.01), progress=False)
    (root / "my_conf").mkdir()
    (root / "my_conf" / "my_build.yaml").write_text(
        "defaults: [build, _self_]\ninputs: [scored.jsonl]\noutput: mine\ntokenizer: models/target\n"
        "reward_temperature: 0.1\n"
    )
    nemo = (ROOT / "tests" / "assets" / "nemo" / "dpo.yaml").read_text()
    (root / "gpt_dpo.yaml").write_text(nemo.replace("warmup_steps: 10", "warmup_steps: 0"))  # 8 prompts are one step
    (root / "my_prompts.txt").write_text("Hello\n")
    (root / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    hf_to_megatron(target, root / "runs" / "fuserl" / "checkpoints")
    shutil.copytree(root / "runs" / "fuserl" / "checkpoints", root / "checkpoints" / "other")
    return root


@pytest.fixture
def typed(place, monkeypatch, capsys):
    """typed(line) -> what it printed; it must end with 0."""
    monkeypatch.chdir(place)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "FUSERL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    started = []
    for place_of_use in ("train", "on_ranks"):
        monkeypatch.setattr(f"fuserl_megatron.cli.{place_of_use}.becomes_rank", lambda config, ranks: False)
    monkeypatch.setattr(ranks, "run_ranks", lambda command, ranks, **_: started.append(ranks) or 0)

    def run(line):
        words, redirected, file = shlex.split(line)[1:], None, None
        if ">" in words:
            words, redirected, file = words[: words.index(">")], True, words[-1]
        command = words[0]
        if "armorm" in line or command in (
            "verify",
            "doctor",
            "demo",
            "sample",
            "logprobs",
            "score",
            "generate",
        ):  # need servers, a large model
            build_parser().parse_args(words)
            return
        for word in words:  # what is to be written must not be there
            if command == "build" and word.startswith("output="):
                shutil.move(place / word.partition("=")[2], place / "aside")
        try:
            code = main([*words, "--dry-run"] if command in ("train", "launch") and "--dry-run" not in words else words)
        finally:
            if (place / "aside").exists():
                (name,) = [word.partition("=")[2] for word in words if word.startswith("output=")]
                shutil.rmtree(place / name, ignore_errors=True)
                shutil.move(place / "aside", place / name)
        out, err = capsys.readouterr()
        assert code == 0, err
        assert err == "" or command == "convert", err
        assert bool(started) == (command in ("evaluate", "parity"))
        if redirected:
            (place / file).write_text(out)
        if command == "convert":
            shutil.rmtree(place / words[3])

    return run


def test_examples_are_found():
    assert len(FROM_HELP) > 20 and len(FROM_PAGES) >= 8
    assert {line.split()[1] for line in FROM_HELP} == {name.split()[0] for name in COMMANDS if name}


@pytest.mark.parametrize(
    "line", sorted({*FROM_HELP, *FROM_PAGES}, key=lambda line: ("--config-name mine" in line, line))
)
def test_it_works_as_typed(typed, line):
    if "mine.yaml" in line and "train" in line:
        typed("fuserl nemo-config gpt_dpo.yaml > mine.yaml")
    typed(line)


def test_a_build_without_a_temperature_shows_what_the_rule_gives(place, monkeypatch, capsys):
    """The table of docs/data_format.md, as it is there: one prompt with the four scores of that page."""
    monkeypatch.chdir(place)
    scores = zip("abcd", (0.18, 0.165, 0.172, 0.151), strict=True)
    rows = [json.dumps({"prompt": "p", "source": s, "response": s, "reward": r}) + "\n" for s, r in scores]
    (place / "four.jsonl").write_text("".join(rows))
    assert main(["build", "inputs=[four.jsonl]", "output=none", "tokenizer=models/target"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fuserl: error: reward_temperature is required") and err.count("\n") == 1
    page = (ROOT / "docs" / "data_format.md").read_text()
    assert out.count("\n") == 5 and all(f"    {line}\n" in page for line in out.splitlines())
    assert not (place / "none").exists()
