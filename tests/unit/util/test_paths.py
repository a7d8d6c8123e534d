"""Paths that are not there: the one that was meant is named, and a run where a model is asked for."""

import pytest

from fuserl_megatron import cli
from fuserl_megatron.util import hub
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.paths import did_you_mean, export_of_run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """models/llama, and runs/sft, a run that has exported its model."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "FUSERL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    for folder in ("models/llama", "runs/sft/hf"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    return tmp_path


def test_the_near_name_of_the_first_part_that_is_missing(here):
    assert did_you_mean("models/llma") == "; did you mean models/llama?"
    assert did_you_mean("model/llama/config.json") == "; did you mean models/llama/config.json?"
    assert did_you_mean(here / "modles") == f"; did you mean {here / 'models'}?"
    for nothing in ("models/llama", "models/mistral", "model/mistral", "", "models/llama/config.json/x", "\0"):
        assert did_you_mean(nothing) == ""


def test_a_run_is_known_by_its_export(here):
    assert export_of_run("runs/sft") == "; it is a run, and its model is runs/sft/hf"
    assert export_of_run("models/llama") == export_of_run("runs") == export_of_run("none") == ""


def test_every_command_answers_with_what_is_there(here, monkeypatch, capsys):
    """Also where the typo looks like a name of the hub, and nobody answers there."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"models/llma: no such directory; did you mean models/llama\?$"):
        hub.local_model("models/llma")
    build = ["build", "output=o", "reward_temperature=1"]
    (here / "scored.jsonl").write_text("")
    cases = [
        (["train", "model.path=modles/llama", "data.path=d"], "modles/llama: no such directory; did you mean models"),
        (["train", "model.path=./models/llma", "data.path=d"], "no such directory; did you mean models/llama?"),
        (["evaluate", "model.path=runs/sft", "data.path=d"], "runs/sft: holds no config.json; it is a run, and"),
        (["convert", "hf-to-megatron", "runs/sft", "o"], "it is a run, and its model is runs/sft/hf"),
        (["convert", "megatron-to-hf", "runs/stf", "o"], "runs/stf: no such directory; did you mean"),
        ([*build, "inputs=[scored.jsonl]", "tokenizer=runs/sft"], "it is a run, and its model is runs/sft/hf"),
        ([*build, "inputs=[scorde.jsonl]", "tokenizer=models/llama"], "inputs: scorde.jsonl does not exist; did you"),
        (["launch", "target=runs/sft", "stages=[fusesft]"], "it is a run, and its model is runs/sft/hf"),
        (["train", "my.yaml"], "a file of settings is given as --config-name my.yaml"),
        (["train", "model.path=it's"], """put the value in quotes: 'model.path="it'"'"'s"'"""),
    ]
    for words, expected in cases:
        assert cli.main(words) == 2, words
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, (words, error)
