"""SimPO, RLOO, WRPO, KTO and others: the float64 twin's numbers under every layout (<= 1e-5); reference three ways."""

import dataclasses
import functools

import pytest
from fusion_case import DPO, LOSSES, loss_and_gradients, several, twin, worst_relative_error
from fusion_case import make_config as make_any_config
from test_layouts import BOUND, check, compare, planted

MAIN = ["simpo", "rloo", "wrpo", "kto"]
LAYOUTS = {
    "tp2 sp": (dict(tp=2, sp=True), 2),
    "cp2": (dict(cp=2), 2),
    "pp2": (dict(pp=2), 2),
    "tp2 pp2 sp": (dict(tp=2, pp=2, sp=True), 4),
    "dp2, a prompt's sources spread over ranks": (dict(packing=False, rows=3, seq_length=96), 2),
    "one row a micro-batch": (dict(rows=1, seq_length=400), 1),
    "prefix shared": (dict(rows=2, seq_length=240, share="on"), 1),
}


def make_config(case, objective, **changes):
    """All responses of a prompt (RLOO) fit two rows."""
    return make_any_config(case, objective, **{"seq_length": 200, **changes})


@pytest.fixture(scope="module")
def expected(case):
    return functools.cache(lambda name: twin(case, LOSSES[name]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MAIN)
def test_layout_parity(ranks, case, expected, tmp_path, name, layout):
    changes, world = LAYOUTS[layout]
    result = check(ranks, expected(name), make_config(case, LOSSES[name], **changes), world, tmp_path / "reference")
    if name == "kto":
        assert result[0] != pytest.approx(0.5 * (1 + 1.5) / 2, abs=1e-3)  # kl and beta are such that something is seen


@pytest.mark.parametrize("layout", ["tp2 sp", "pp2", "dp2, a prompt's sources spread over ranks"])
def test_the_other_losses(ranks, case, expected, tmp_path, layout):
    """All in one job: only the loss differs."""
    changes, world = LAYOUTS[layout]
    names = [name for name in LOSSES if name not in MAIN]
    configs = [make_config(case, LOSSES[name], **changes) for name in names]
    by_rank = ranks.run(several, world, configs, str(tmp_path / "reference"), timeout=600)
    for name, *results in zip(names, *by_rank, strict=True):
        compare(results, expected(name))


@pytest.mark.parametrize("name", ["simpo", "rloo"])
def test_a_ragged_last_batch_is_divided_by_its_own_prompts(ranks, case, expected, tmp_path, name):
    config = make_config(case, LOSSES[name], global_batch_size=4)
    parts = [ranks.run(loss_and_gradients, 2, config, str(tmp_path / "reference"), step)[0] for step in (0, 1)]
    counts = [part[5] for part in parts]
    assert counts == [4, 3]
    loss, grads = expected(name)
    assert sum(c * part[0] for c, part in zip(counts, parts, strict=True)) / 7 == pytest.approx(loss, rel=BOUND)
    whole = {n: sum(c * part[3][n] for c, part in zip(counts, parts, strict=True)) / 7 for n in grads}
    assert worst_relative_error(whole, grads) <= BOUND


@pytest.mark.parametrize("fault, world", [("divide_by_rows", 1), ("divide_by_local_count", 2)])
def test_negative_controls_break_the_bound(ranks, case, expected, tmp_path, fault, world):
    configs = [make_config(case, LOSSES[name]) for name in MAIN]
    found = ranks.run(planted, world, fault, configs, str(tmp_path / "reference"), timeout=600)[0]
    errors = {n: worst_relative_error(f[3], expected(n)[1]) for n, f in zip(MAIN, found, strict=True)}
    print(fault, errors)
    assert min(errors.values()) > 1000 * BOUND


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_three_reference_modes_give_the_same_numbers(ranks, case, tmp_path, name):
    found = {}
    for mode in ("cache", "resident", "swap"):
        objective, layout = (DPO, dict(tp=2)) if name == "dpo" else (LOSSES["kto"], dict(cp=2))
        config = make_config(case, objective, **layout)
        config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, reference_mode=mode))
        found[mode] = ranks.run(loss_and_gradients, 2, config, str(tmp_path / mode))[0]
        assert (tmp_path / mode).exists() == (mode == "cache")
    loss, _, _, grads, *_ = found["cache"]
    for mode in ("resident", "swap"):
        assert found[mode][0] == pytest.approx(loss, rel=1e-6)
        assert worst_relative_error(found[mode][3], grads) <= BOUND


def test_a_reference_free_loss_loads_no_reference(ranks, case, tmp_path):
    config = make_config(case, LOSSES["simpo"])
    assert config.objective.reference is None
    metrics = ranks.run(loss_and_gradients, 1, config, str(tmp_path / "reference"))[0][1]
    assert not (tmp_path / "reference").exists() and "kl_to_reference" not in metrics


def test_metrics_are_the_same_under_every_layout(ranks, case, tmp_path):
    for name in ("rloo", "kto", "wrpo"):
        runs = [
            ranks.run(loss_and_gradients, world, make_config(case, LOSSES[name], **changes), str(tmp_path / name))[0][1]
            for changes, world in (LAYOUTS["pp2"], LAYOUTS["dp2, a prompt's sources spread over ranks"])
        ]
        assert runs[0] == pytest.approx(runs[1], rel=1e-4, abs=1e-5, nan_ok=True)
        shares = [v for k, v in runs[0].items() if k.startswith("weight_share/")]
        assert sum(shares) == pytest.approx(1.0) and len(shares) == 3
        assert ("accuracy" in runs[0]) == (name != "kto")
        for metric in ("preference_loss", "margin") + (("accuracy",) if name != "kto" else ()):
            assert all(f"{metric}/{source}" in runs[0] for source in ("alpha", "beta", "gamma"))
        difference = runs[0]["chosen_implicit_reward"] - runs[0]["rejected_implicit_reward"]
        assert runs[0]["margin"] == pytest.approx(difference)
