import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_origin, get_type_hints

import pytest
import yaml

from fuserl_megatron import __version__
from fuserl_megatron.cli import demo, doctor, main
from fuserl_megatron.cli.app import build_parser
from fuserl_megatron.cli.convert import _bytes
from fuserl_megatron.cli.exit_codes import STOPS
from fuserl_megatron.config.load import from_dict, load_config
from fuserl_megatron.config.objective import with_defaults
from fuserl_megatron.config.schema import Config
from fuserl_megatron.data.dataset import FORMAT_VERSION, Manifest
from fuserl_megatron.train.preflight import check
from fuserl_megatron.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LLAMA = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=160,
    max_position_embeddings=512,
)
RESPONSES = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "z")]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "FUSERL_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def paths(tmp_path):
    """Overrides that name a model directory (its config only) and a data set (its manifest only)."""
    empty = {int: 0, float: 0.0, str: "", bool: False, list: [], dict: {}}
    kinds = {name: get_origin(kind) or kind for name, kind in get_type_hints(Manifest).items()}
    values = {name: empty.get(kind) for name, kind in kinds.items()}
    values |= dict(
        format_version=FORMAT_VERSION, sources=["a", "b"], num_prompts=1000, max_token_id=159, tokens={"total_max": 300}
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(Manifest(**values).to_json())
    return [f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'data'}"]


@pytest.fixture(scope="module")
def real_paths(tmp_path_factory):
    """The same with 1,000 real prompts, two sources and two responses of each."""
    from fuserl_megatron.config.schema import BuildConfig
    from fuserl_megatron.records.build import build
    from fuserl_megatron.testing.tiny import save_char_tokenizer

    root = tmp_path_factory.mktemp("real")
    save_char_tokenizer(root / "model")
    (root / "model" / "config.json").write_text(json.dumps(LLAMA))
    records = [dict(prompt=f"p{p}", source=s, response=r * 9, reward=ord(r)) for p in range(1000) for s, r in RESPONSES]
    (root / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    settings = dict(inputs=(str(root / "records.jsonl"),), output=str(root / "data"), tokenizer=str(root / "model"))
    build(BuildConfig(**settings, reward_temperature=1.0), progress=False)
    return [f"model.path={root / 'model'}", f"data.path={root / 'data'}"]


def error_line(capsys, *arguments):
    """The one line on standard error of a command that ends with exit code 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fuserl: error: ") and err.count("\n") == 1
    return err.removeprefix("fuserl: error: ").rstrip("\n")


def all_commands(parser=None, path=()):
    """Every command and subcommand, as words."""
    yield path
    for action in (parser or build_parser())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from all_commands(sub, (*path, name))


@pytest.mark.parametrize("words", list(all_commands()), ids=" ".join)
def test_help_of_every_command_has_an_example(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"  fuserl {' '.join(words)}".rstrip() in text.split("example", 1)[1]


def test_the_commands():
    names = {" ".join(words) for words in all_commands()}
    assert {"build", "train", "convert", "verify", "doctor", "demo"} <= names
    assert {"convert hf-to-megatron", "convert megatron-to-hf"} <= names


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"fuserl {__version__}\n")


@pytest.mark.parametrize(
    "words", [[], ["trian"], ["train", "--bogus"], ["doctor", "x=1"], ["convert"], ["train", "--nproc", "two"]]
)
def test_a_wrong_command_line_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and "error" in capsys.readouterr().err


def test_examples_in_the_help_are_valid_settings(capsys):
    """What --help tells people to type goes through the loader."""
    for kind in ("build", "train"):
        with pytest.raises(SystemExit):
            main([kind, "--help"])
        lines = [line.strip() for line in capsys.readouterr().out.splitlines() if f" {kind} " in line]
        lines = [line for line in lines if "=" in line and "..." not in line and "--config" not in line]
        assert len(lines) >= 2
        for line in lines:
            load_config(kind, [word for word in line.split() if "=" in word])


# --- user errors ---


def test_user_errors_come_before_torch():
    """In a fresh interpreter, as typed: one line, exit code 2, and nothing heavy loaded on the way."""
    cases = [
        (["train", "optim.lrr=1"], "optim.lrr: no such key. Did you mean optim.lr?"),
        (["train", "model.path=/none", "data.path=/none", "model=tiny", "--nproc", "3"], "world size 3: must be"),
        (["train", "model.path=/none", "data.path=/none"], "model.path=/none: no such directory"),
        (["build", "inputs=[a]"], "output: required and not set"),
        (["convert", "megatron-to-hf", "a", "b", "--max-shard-size", "big"], "--max-shard-size big: is no size"),
        (["convert", "megatron-to-hf", "a", "b", "--max-shard-size", "infGB"], "--max-shard-size infGB: is no size"),
    ]
    code = (
        "import sys; from fuserl_megatron.cli import main\n"
        f"codes = [main(words) for words in {[words for words, _ in cases]!r}]\n"
        "print(codes, [name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.stdout.strip() == f"{[2] * len(cases)} []", done.stderr
    for line, (_, expected) in zip(done.stderr.splitlines(), cases, strict=True):
        assert line.startswith(f"fuserl: error: {expected}")


def test_paths_in_errors(capsys, monkeypatch, paths):
    def fail(options):
        raise PermissionError(13, "Permission denied", "/locked/file")

    monkeypatch.setattr(doctor, "run", fail)
    assert error_line(capsys, "doctor") == "/locked/file: Permission denied"
    assert "is not a fused data set" in error_line(capsys, "train", paths[0], "data.path=/none")
    assert "config.json" in error_line(capsys, "train", f"model.path={ROOT}", paths[1])


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("FUSERL_DEBUG", "1")
    with pytest.raises(UserError):
        main(["train", "optim.lrr=1"])


def test_ctrl_c_ends_with_130(monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    assert main(["doctor"]) == 130


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_second_signal_does_not_cut_the_clean_up_short(monkeypatch, name, code):
    cleaned_up = []

    def stopped_three_times(options):
        try:
            signal.raise_signal(getattr(signal, name))
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            cleaned_up.append(True)

    monkeypatch.setattr(doctor, "run", stopped_three_times)
    usual = {number: signal.SIG_DFL for number in STOPS} | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}  # pytest may run under nohup
    try:
        ended = main(["doctor"])
    except SystemExit as stopped:
        ended = stopped.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (ended, cleaned_up) == (code, [True])


def test_what_is_ignored_stays_ignored(monkeypatch):
    """As under nohup."""
    monkeypatch.setattr(doctor, "run", lambda options: signal.raise_signal(signal.SIGHUP) or 0)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["doctor"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_build_that_is_ended_leaves_nothing(tmp_path):
    """SIGTERM, as a scheduler sends it, while records are being read."""
    code = (
        "import sys, time\n"
        "from fuserl_megatron.records import build\n"
        "def slowly(*args):\n    print('reading', flush=True)\n    time.sleep(60)\n"
        "build.load_groups = slowly\n"
        "from fuserl_megatron.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    from fuserl_megatron.testing.tiny import save_char_tokenizer

    save_char_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "in.jsonl").write_text("{}\n")
    words = ["inputs=[in.jsonl]", "output=fused", "tokenizer=tokenizer", "reward_temperature=0.1"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "build", *words]
    process = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "reading\n"
    assert any(path.name.startswith(".fused.partial") for path in tmp_path.iterdir())  # it was at work
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 143
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "tokenizer"]


@pytest.mark.parametrize("number", STOPS)
def test_the_caller_s_handlers_come_back(capsys, number):
    before = signal.getsignal(number)
    error_line(capsys, "build", "inputs=[a]")
    assert signal.getsignal(number) is before


def test_tensor_parallel_that_does_not_divide_the_heads(capsys, paths):
    line = error_line(capsys, "train", *paths, "model.tensor_model_parallel_size=3")
    assert line.startswith("model.tensor_model_parallel_size=3: does not divide the model's 8 attention heads;")


def test_nproc(capsys, monkeypatch, paths):
    assert error_line(capsys, "train", "--nproc", "0", *paths).startswith("--nproc 0: must be at least 1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "has started the ranks already" in error_line(capsys, "train", "--nproc", "2", *paths)
    assert error_line(capsys, "train", *paths, "model.pipeline_model_parallel_size=4").startswith("world size 2:")


def test_a_monitor_is_known_before_any_rank_starts(capsys, real_paths):
    words = ["train", *real_paths, real_paths[1].replace("data.path", "data.validation_path"), "--dry-run"]
    monitor = "exp_manager.checkpoint_callback_params.monitor"
    assert main([*words, f"{monitor}=val_nll_per_token/a"]) == 0
    capsys.readouterr()
    line = error_line(capsys, *words, f"{monitor}=val_nll_per_token/c")
    assert line.startswith(f"{monitor}=val_nll_per_token/c: no such metric. Did you mean val_nll_per_token/")
    assert "is not a fused data set" in error_line(capsys, *words[:-2], "data.validation_path=/none", "--dry-run")


def test_a_demo_outside_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "site" / "fuserl_megatron" / "cli" / "demo.py"))
    assert "clone the repository" in error_line(capsys, "demo")


def test_the_demo_is_the_checkout_s_wherever_it_is_started(monkeypatch, tmp_path):
    for name in ("here", "checkout"):
        (tmp_path / name / "examples" / "skills").mkdir(parents=True)
        code = f"import pathlib, sys; pathlib.Path(sys.argv[2]).write_text({name!r})"
        (tmp_path / name / "examples" / "skills" / "run_demo.py").write_text(code)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "checkout" / "fuserl_megatron" / "cli" / "demo.py"))
    assert main(["demo", "--dir", str(tmp_path / "ran")]) == 0
    assert (tmp_path / "ran").read_text() == "checkout"


# --- what works ---


def test_dry_run(capsys, real_paths):
    """Settings may stand before and after options; the default number of ranks is what the layout needs."""
    words = [
        "train",
        real_paths[0],
        "--dry-run",
        real_paths[1],
        "model=tiny",
        "data.global_batch_size=100",
        "trainer.max_epochs=2",
    ]
    assert main(words) == 0
    *settings, layout, batch, steps, data = capsys.readouterr().out.splitlines()
    assert layout == "layout   TP 2 x PP 1 x CP 1 x DP 1 = 2 ranks"
    assert (
        batch
        == "batch    100 prompts a step = 100 on each of 1 data-parallel ranks; micro-batch 1 x 2048 = 2048 tokens"
    )
    assert steps == "steps    20 (1000 prompts / 100 = 10 a pass x 2), 2 of them warm-up"
    assert "  global_batch_size: 100" in settings and "  tensor_model_parallel_size: 2" in settings
    assert main([*words, "--nproc", "4"]) == 0
    assert "DP 2 = 4 ranks" in capsys.readouterr().out
    assert data.endswith(": 1000 prompts in 10 steps an epoch, 2000 sequences, 0 pairs")
    pairs = ["objective.stage=fusepo", "objective.loss=dpo", real_paths[1].replace("data.path", "data.validation_path")]
    assert main([*words, *pairs]) == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.endswith(": 1000 prompts in 10 steps an epoch, 4000 sequences, 2000 pairs")


def test_a_dry_run_sees_what_does_not_fit(capsys, real_paths):
    """As the run would, before any rank is started."""
    words = ["train", *real_paths, "--dry-run", "data.micro_batch_size=1"]
    line = error_line(capsys, *words, "data.seq_length=20")
    assert "data.seq_length" in line and "20" in line
    line = error_line(capsys, *words, "objective.stage=fusepo", "objective.loss=rloo", "objective.min_reward_gap=1")
    assert "min_reward_gap" in line
    none = ["objective.stage=fusepo", "objective.loss=dpo", "objective.min_reward_gap=9"]
    assert "no prompt has a pair" in error_line(capsys, *words, *none)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (["objective.stage=fusesft"], dict(selection="per_source", nll_reduction="token_mean", beta=None)),
        (["objective.stage=fusesft", "objective.selection=top_m"], dict(selection="top_m", top_m=4)),
        (["objective.stage=fusepo", "objective.loss=dpo"], dict(beta=0.01, reference_mode="cache", kl_coef=None)),
        (["objective.stage=fusepo", "objective.loss=simpo", "objective.beta=3"], dict(beta=3.0, reference_mode=None)),
    ],
)
def test_dry_run_shows_the_values_the_loss_will_use(capsys, real_paths, objective, expected):
    """And what it prints is a configuration with the same meaning."""
    assert main(["train", *real_paths, "--dry-run", *objective]) == 0
    shown = yaml.safe_load(capsys.readouterr().out.split("\nlayout ")[0])
    assert shown["objective"].items() >= expected.items()
    config = from_dict(Config, shown)
    assert check(config, 1)[0] and with_defaults(config.objective) == config.objective


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5KB", 1500), ("77", 77)])
def test_sizes(text, size):
    assert _bytes(text) == size


# --- doctor ---


def test_doctor_refuses_an_unrelated_apex(tmp_path):
    """A package of that name without NVIDIA's contents, as `pip install apex` gives; everything else is fine here."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "fuserl_megatron.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=600)
    report = json.loads(done.stdout)
    status = {finding["name"]: finding["status"] for finding in report["findings"]}
    assert done.returncode == 1 and not report["works"], done.stderr
    assert [name for name, value in status.items() if value == "broken"] == ["apex"]
    assert status["torch"] == status["megatron-core"] == "ok"


def test_doctor_knows_nvidias_apex_by_its_contents(tmp_path):
    assert doctor.apex_kind(None) == "none"
    assert doctor.apex_kind(tmp_path) == "pypi"
    (tmp_path / "normalization").mkdir()
    (tmp_path / "normalization" / "fused_layer_norm.py").touch()
    assert doctor.apex_kind(tmp_path) == "nvidia"


@pytest.mark.parametrize(
    ("versions", "name", "status"),
    [
        ({"megatron-core": "0.16.1"}, "megatron-core", "ok"),
        ({"megatron-core": "0.16.0"}, "megatron-core", "broken"),
        ({"megatron-core": "0.20.0"}, "megatron-core", "broken"),
        ({}, "megatron-core", "broken"),
        ({"megatron-core": "0.16.1"}, "triton", "missing"),
        ({"megatron-core": "0.19.2"}, "triton", "broken"),
        ({"megatron-core": "0.19.2", "triton": "3.7.1"}, "triton", "ok"),
        ({}, "psutil", "broken"),
    ],
)
def test_doctor_versions(monkeypatch, versions, name, status):
    monkeypatch.setattr(doctor, "version", versions.get)
    finding = {"megatron-core": doctor._core, "triton": doctor._triton}.get(name, lambda: doctor._required(name))()
    assert (finding.name, finding.status) == (name, status)
    assert bool(finding.remedy) == (status == "broken")


@pytest.mark.parametrize(
    ("text", "expected"), [("0.16.1", (0, 16, 1)), ("2.13.0+cpu", (2, 13, 0)), ("0.17.0rc1", (0, 17, 0))]
)
def test_version_numbers(text, expected):
    assert doctor.numbers(text) == expected


def test_no_memory_is_one_line(capsys, monkeypatch):
    def fail(options):
        raise MemoryError

    monkeypatch.setattr(doctor, "run", fail)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "fuserl: error: out of memory: use a machine with more, or less at once\n"


def test_no_memory_while_a_tokenizer_opens_is_not_blamed_on_it(monkeypatch, tmp_path, capsys):
    import transformers

    from fuserl_megatron.testing.tiny import save_char_tokenizer

    def fail(*_, **__):
        raise MemoryError

    save_char_tokenizer(tmp_path)
    (tmp_path / "in.jsonl").write_text("{}\n")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    words = [f"inputs=[{tmp_path}/in.jsonl]", f"output={tmp_path}/fused", f"tokenizer={tmp_path}"]
    assert main(["build", *words, "reward_temperature=0.1"]) == 1
    assert capsys.readouterr().err.startswith("fuserl: error: out of memory")
