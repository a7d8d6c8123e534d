"""Every loss: its options are taken, those of others refused with the losses that take them; one table of defaults."""

import dataclasses

import pytest

from fuserl_megatron.config.load import load_config
from fuserl_megatron.config.objective import OF_STAGE, check_objective, loss_options, uses_reference, with_defaults
from fuserl_megatron.config.schema import ObjectiveConfig
from fuserl_megatron.objectives import LOSSES
from fuserl_megatron.util.errors import UserError

NEEDED = {"cdpo": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}, "wrpo": {"target_source": "me"}}
VALUES = {"length_normalized": False, "fusion": "mean", "label_smoothing": 0.2}


def objective(loss, **options):
    return ObjectiveConfig(stage="fusepo", loss=loss, **{**NEEDED.get(loss, {}), **options})


def error_of(config):
    with pytest.raises(UserError) as caught:
        check_objective(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_schema_s_options_are_the_table_s():
    options = {option for spec in LOSSES.values() for option in spec.options}
    rest = {
        "stage",
        "loss",
        "loss_kwargs",
        "target_source",
        "reference",
        "reference_mode",
        "min_reward_gap",
        "max_reward_gap",
    }
    names = {field.name for field in dataclasses.fields(ObjectiveConfig)}
    assert names == {*rest, *options, *OF_STAGE["fusesft"]} == {"stage", *OF_STAGE["fusesft"], *OF_STAGE["fusepo"]}


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_takes_its_options_and_no_others(loss):
    own = LOSSES[loss].options
    for name in {option for spec in LOSSES.values() for option in spec.options}:
        given = objective(loss, **{name: VALUES.get(name, 0.3)})
        if name in own:
            check_objective(given)
            assert loss_options(given)[name] == VALUES.get(name, 0.3)
        else:
            users = ", ".join(other for other, spec in LOSSES.items() if name in spec.options)
            assert f"loss {loss} does not use it ({users} would); objective.{name}=null would work." in error_of(given)
    filled = with_defaults(objective(loss))
    assert set(loss_options(filled)) == set(own)
    assert filled.reference_mode == ("cache" if uses_reference(filled) else None)


@pytest.mark.parametrize(
    "given, expected",
    [
        (
            dict(loss="cdpo", label_smoothing=None),
            "label_smoothing=null: objective.loss=cdpo needs it; objective.label_smoothing=0.1 would",
        ),
        (dict(loss="lndpo"), "objective.loss=lndpo: not one of dpo, ln_dpo, cdpo, "),
        (dict(loss="lndpo"), ". Did you mean ln_dpo?"),
        (dict(loss="wrpo", target_source=None), "objective.target_source=null: objective.loss=wrpo needs it"),
        (dict(loss="dpo", target_source="me"), "objective.target_source=me: loss dpo does not use it (wrpo would)"),
        (dict(loss="cdpo", label_smoothing=0.5), "label_smoothing=0.5 must be a number in [0, 0.5)"),
        (dict(loss="simpo", reference="/r"), "objective.reference=/r: loss simpo reads no reference"),
        (
            dict(loss="rloo", reference_mode="swap"),
            "objective.reference_mode=swap: rloo without objective.kl_coef reads no",
        ),
        (dict(loss="rloo", min_reward_gap=0.1), "loss rloo takes every response and makes no pairs"),
        (dict(loss="rloo", beta=0.1), "loss rloo does not use it (dpo, ln_dpo,"),
    ],
)
def test_refusals(given, expected):
    assert expected in error_of(objective(**given))


def test_rloo_with_a_kl_term_reads_a_reference():
    assert uses_reference(with_defaults(objective("rloo", kl_coef=0.1, reference="/r")))
    assert not uses_reference(with_defaults(objective("rloo")))


def test_options_of_fusepo_are_refused_in_fusesft():
    assert "gamma_beta_ratio=0.3: belongs to objective.stage=fusepo" in error_of(ObjectiveConfig(gamma_beta_ratio=0.3))


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["trainer.val_check_interval=5"], "trainer.val_check_interval=5: needs data.validation_path"),
        (["exp_manager.checkpoint_callback_params.monitor=val_loss"], "monitor=val_loss: needs data.validation_path"),
        (
            ["data.validation_path=/v", "exp_manager.checkpoint_callback_params.monitor=loss"],
            "must be a validation metric",
        ),
        (["exp_manager.checkpoint_callback_params.mode=max"], "mode=max: is used with"),
        (
            ["exp_manager.early_stopping_callback_params.patience=2"],
            "patience=2: needs exp_manager.checkpoint_callback_params",
        ),
        (["run.disable_checks=[weights]"], "run.disable_checks=weights: not one of first_step_loss, prompt_weights"),
        (
            ["objective=fusepo_dpo", "objective.reference_mode=swap", "optim=distributed"],
            "may still be writing weights",
        ),
        (
            ["objective=fusepo_simpo", "objective.label_smoothing=0.1"],
            "loss simpo does not use it (cdpo, robust, exo would)",
        ),
    ],
)
def test_rules_of_a_whole_run(overrides, expected):
    from fuserl_megatron.config.validate import validate

    with pytest.raises(UserError) as caught:
        validate(load_config("train", ["model.path=/m", "data.path=/d", *overrides]), 1)
    assert expected in str(caught.value)
