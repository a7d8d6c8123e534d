"""NeMo's exp_manager keys: where the run lies, what contradicts what. docs/nemo.md states the semantics."""

import pytest

from fuserl_megatron.config.load import load_config
from fuserl_megatron.config.validate import validate
from fuserl_megatron.util.errors import UserError

PATHS = ["model.path=/m", "data.path=/d"]
M = "exp_manager."


@pytest.mark.parametrize(
    ("overrides", "name", "directory"),
    [
        ([], "fuserl", "runs/fuserl"),
        ([M + "explicit_log_dir=/results"], "fuserl", "/results"),
        ([M + "explicit_log_dir=/results", M + "name=gpt"], "gpt", "/results"),
        ([M + "name=gpt"], "gpt", "runs/fuserl/gpt"),
        (["run.results_dir=/exp", M + "name=gpt", M + "version=v2"], "gpt", "/exp/gpt/v2"),
        ([M + "version=v2"], "fuserl", "runs/fuserl/v2"),
        (["recipe=llama31_8b_fusesft", M + "explicit_log_dir=/results"], "llama31_8b_fusesft", "/results"),
    ],
)
def test_names_and_folders_become_run(overrides, name, directory):
    config = load_config("train", [*PATHS, *overrides])
    assert (config.run.name, config.run.results_dir) == (name, directory)
    manager = config.exp_manager
    assert (manager.explicit_log_dir, manager.name, manager.version) == (None, None, None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([M + "explicit_log_dir=/a", M + "version=1x"], "exp_manager.version=1x: exp_manager.explicit_log_dir=/a"),
        ([M + "explicit_log_dir=/a", "run.results_dir=/b"], "run.results_dir=/b says otherwise"),
        ([M + "name=a", "run.name=b"], "run.name=b says otherwise"),
        ([M + "name=a/b"], "exp_manager.name=a/b: must be the name of one folder"),
        ([M + "version=.."], "exp_manager.version=..: must be the name of one folder"),
    ],
)
def test_contradictions_are_refused(overrides, words):
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        load_config("train", [*PATHS, *overrides])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([M + "resume_if_exists=false", M + "resume_ignore_no_checkpoint=false"], "resume_ignore_no_checkpoint=false"),
        ([M + "create_wandb_logger=true"], "exp_manager.wandb_logger_kwargs.project=null"),
        ([M + "wandb_logger_kwargs.project=p"], "is used with exp_manager.create_wandb_logger=true only"),
        ([M + "mlflow_logger_kwargs.tracking_uri=http://h"], "is used with exp_manager.create_mlflow_logger=true only"),
    ],
)
def test_options_that_would_do_nothing_are_refused(overrides, words):
    with pytest.raises(UserError) as caught:
        validate(load_config("train", [*PATHS, *overrides]), 1)
    assert words in str(caught.value)


def test_an_address_with_a_password_is_refused():
    settings = [M + "create_mlflow_logger=true", M + "mlflow_logger_kwargs.tracking_uri='http://me:hush@host'"]
    with pytest.raises(UserError) as caught:
        load_config("train", [*PATHS, *settings])
    assert "tracking_uri: an address with a password" in str(caught.value) and "hush" not in str(caught.value)
    validate(load_config("train", [*PATHS, settings[0], settings[1].replace("me:hush@", "")]), 1)
