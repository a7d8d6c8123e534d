"""Every precision and optimizer setting offered for a GPU trains, saves, is killed and resumed with equal losses."""

import itertools

import pytest
from fusion_case import DPO, SFT

PRECISIONS = ["bf16", "fp8_current", "fp8_delayed"]
AWARE = dict(use_precision_aware_optimizer=True)
COMBINATIONS = [
    (precision, fp8_params, aware, async_save)
    for precision, fp8_params, aware, async_save in itertools.product(PRECISIONS, *[[False, True]] * 3)
    if precision != "bf16" or not fp8_params  # FP8 weights come with an FP8 recipe
]


def three_steps(precision, fp8_params, aware, async_save, directory, paths, objective=SFT, **settings):
    from rehearsed import config_of

    settings = dict(distopt=True, lr=2e-3, max_steps=3, every=1, precision=precision) | settings
    optim = AWARE if aware else {}
    return config_of(
        paths, objective, directory, model=dict(fp8_params=fp8_params), optim=optim, async_save=async_save, **settings
    )


@pytest.mark.parametrize("precision, fp8_params, aware, async_save", COMBINATIONS)
def test_a_killed_run_goes_on_with_equal_losses(ranks, case, tmp_path, precision, fp8_params, aware, async_save):
    import rehearsed

    config = three_steps(precision, fp8_params, aware, async_save, tmp_path / "run", case)
    ((whole, folders),) = ranks.run(rehearsed.training, 1, config)
    assert folders[-1] == "iter_0000003" and whole[2][0] < 0.8 * whole[0][0]
    rehearsed.without_the_last_checkpoint(tmp_path / "run")
    ((resumed, _),) = ranks.run(rehearsed.training, 1, config)
    assert resumed == whole[2:]
    if precision == "fp8_delayed" and fp8_params:  # nothing of what the memory held before
        config = three_steps(precision, fp8_params, aware, async_save, tmp_path / "again", case)
        ((again, _),) = ranks.run(rehearsed.training, 1, config)
        assert again == whole


@pytest.mark.parametrize(
    "states", [dict(exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16"), dict(main_params_dtype="fp16")]
)
def test_states_in_16_bits_resume(ranks, case, tmp_path, states):
    import rehearsed

    config = rehearsed.config_of(
        case, DPO, tmp_path, optim=AWARE | states, distopt=True, lr=2e-3, max_steps=3, every=1, precision="bf16"
    )
    ((whole, _),) = ranks.run(rehearsed.training, 1, config)
    rehearsed.without_the_last_checkpoint(tmp_path)
    ((resumed, _),) = ranks.run(rehearsed.training, 1, config)
    assert resumed == whole[2:]


def test_a_checkpoint_crosses_between_layers_and_optimizers(ranks, case, tmp_path):
    """Trained on one kind of layers, gone on with the other: the same weights, masters and moments within bf16."""
    import rehearsed

    settings = dict(distopt=True, lr=2e-3, max_steps=3, every=1, precision="bf16")
    for te in (True, False):
        config = rehearsed.config_of(case, SFT, tmp_path / str(te), **settings)
        ((whole, _),) = ranks.run(rehearsed.training, 1, config, te)
        rehearsed.without_the_last_checkpoint(tmp_path / str(te))
        ((crossed, _),) = ranks.run(rehearsed.training, 1, config, not te)
        assert crossed[0][0] == pytest.approx(whole[2][0], rel=0.02)
