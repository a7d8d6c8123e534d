"""docs/extending.md: its code is examples/extending/extras.py, each object of it works, each mistake is one line."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from fuserl_megatron.cli import main
from fuserl_megatron.config.load import load_config, to_yaml
from fuserl_megatron.config.objective import open_loss, spec_of, uses_reference, with_loss_defaults
from fuserl_megatron.config.validate import validate
from fuserl_megatron.testing.losses import check_loss, example_batch
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.named import load_named

ROOT = Path(__file__).resolve().parents[2]
PATHS = ["model.path=m", "data.path=d"]
LOSS = ["objective.stage=fusepo", "objective.loss=extras:APO_ZERO"]


@pytest.fixture(autouse=True)
def importable(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "examples" / "extending")
    (tmp_path / "modules").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "modules")


def test_the_page_shows_the_file():
    source = (ROOT / "examples" / "extending" / "extras.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    assert len(blocks) == 5 and all(block in source for block in blocks)


def test_a_loss_of_one_s_own():
    config = load_config("train", [*PATHS, *LOSS, "objective.loss_kwargs.pull=0.5", "objective.beta=0.2"])
    validate(config, 1)
    filled = with_loss_defaults(config)
    assert filled.objective.loss_kwargs == {"pull": 0.5} and filled.objective.rpo_alpha == 0.0
    assert filled.objective.reference_mode == "cache" and uses_reference(config.objective)
    assert "pull: 0.5" in to_yaml(filled)
    loss = open_loss(filled, ["a"])
    assert "margin" in loss.metric_names and "kl_to_reference" in loss.metric_names
    check_loss(spec_of(filled.objective))
    assert with_loss_defaults(filled) == filled


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective.loss=extras:APO_ZER"], "loss=extras:APO_ZER: extras has no APO_ZER. Did you mean APO_ZERO?"),
        (["objective.loss=extras:apo_zero"], "is a function, not a fuserl_megatron.objectives.LossSpec"),
        (["objective.loss=nowhere.losses:x"], "no module nowhere; install it, or put its folder on PYTHONPATH."),
        (["objective.loss=extras.more:x"], "there is no module extras.more"),
        (["objective.loss='extras:'"], "must be package.module:object, such as my_losses:apo_zero."),
        ([*LOSS, "objective.loss_kwargs.pul=1"], "does not use the option 'pul'; did you mean 'pull'?"),
        ([*LOSS, "objective.loss_kwargs.pull=-1"], "pull=-1 must be zero or a positive number"),
        ([*LOSS, "objective.loss_kwargs.beta=1"], "loss_kwargs.beta: is a setting of its own; write objective.beta="),
        ([*LOSS, "objective.kl_coef=1"], "loss apo_zero does not use it (rloo would)"),
        ([*LOSS, "objective.target_source=me"], "loss apo_zero does not use it (wrpo would)"),
        (["objective.loss=dpo", "objective.loss_kwargs.pull=1"], "loss dpo does not use the option 'pull'"),
        (["objective.loss=dpo", "exp_manager.metrics=[extras:nothing]"], "extras has no nothing"),
        (["objective.loss=dpo", "exp_manager.metrics=[extras:APO_ZERO]"], "is no function"),
        (["objective.loss=dpo", "exp_manager.metrics=[mine:margin]"], "there is a metric margin already"),
        (["objective.loss=dpo", "exp_manager.metrics=[broken:x]"], "importing broken fails with ZeroDivisionError"),
        (["objective.loss=dpo", "exp_manager.metrics=[needs:x]"], "needs needs no_such_package, which is not inst"),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path):
    for name, text in (("mine", "margin = print"), ("broken", "1 / 0"), ("needs", "import no_such_package")):
        (tmp_path / "modules" / f"{name}.py").write_text(text)
    with pytest.raises(UserError) as error:
        validate(load_config("train", [*PATHS, "objective.stage=fusepo", *words]), 1)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_metric_of_one_s_own():
    words = [*PATHS, "objective.stage=fusepo", "objective.loss=dpo", "exp_manager.metrics=[extras:longer_chosen]"]
    config = load_config("train", words)
    validate(config, 1)
    loss = open_loss(config, ["a"])
    assert loss.metric_names[-1] == "longer_chosen"
    batch = example_batch(0)
    values_P, mask_P = load_named("extras:longer_chosen", "x")(None, batch)
    lengths_N = batch.lengths_N.tolist()
    assert values_P.tolist() == [float(lengths_N[i] > lengths_N[i + 4]) for i in range(4)] and mask_P is None


def test_a_reader_of_one_s_own(build_dataset, tmp_path):
    file = tmp_path / "ranked.json"
    rows = [{"question": "w1", "answers": {"a": [["w2", 0.1], ["w3", 0.9]], "b": [["w4", 0.5]]}}, {"question": "w5"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    data = build_dataset([], inputs=(str(file),), reader="extras:ranked_lists")
    assert data.sources == ["a", "b"] and data.num_responses == 3 and data.place(1) == f"{file}:1"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for reader, said in (
        ("extras:ranked_lists", f"{file}, after 1: the reader fails with KeyError: 'answers'"),
        ("json:loads", f"{file}: the reader fails with JSONDecodeError"),
        ("os:sep", "reader=os:sep: is no function"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            build_dataset([], inputs=(str(file),), reader=reader, output=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_launcher_of_one_s_own(tmp_path, capfd):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    words = [f"target={tmp_path / 'model'}", f"run.results_dir={tmp_path / 'run'}", "stages=[evaluate]"]
    words += [f"evaluate.command=touch {tmp_path}/seen", "launcher=extras:ShellScript"]
    assert main(["launch", "--dry-run", *words]) == 0
    assert "set -e\ntouch " in capfd.readouterr().out and not (tmp_path / "run").exists()
    assert main(["launch", *words]) == 0 and not (tmp_path / "seen").exists()
    subprocess.run(["sh", tmp_path / "run" / "launch" / "chain.sh"], check=True)
    assert (tmp_path / "seen").exists()
    assert main(["launch", *words]) == 0 and "evaluate: done" in capfd.readouterr().out
    for name, said in (
        ("slrm", "launcher=slrm: not one of fuserl, nemo, nor package.module:object."),
        ("fuser", "Did you mean fuserl?"),
        ("extras:APO_ZERO", "a launcher has check, plan and start"),
    ):
        assert main(["launch", "--dry-run", *words, f"launcher={name}"]) == 2
        assert said in capfd.readouterr().err
