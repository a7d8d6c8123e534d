"""Loss and gradients are the same numbers under every layout, and those of a plain float64 twin (<= 1e-5 relative)."""

import pytest
from fusion_case import DPO, SFT, loss_and_gradients, make_case, make_config, several, twin, worst_relative_error
from mistakes import mistake

BOUND = 1e-5
# tp, pp, dp, sequence parallel
LAYOUTS = [
    (1, 1, 1, 0),
    (1, 1, 2, 0),
    (2, 1, 1, 0),
    (2, 1, 1, 1),
    (1, 2, 1, 0),
    (2, 2, 1, 0),
    (2, 2, 1, 1),
    (2, 1, 2, 1),
]


@pytest.fixture(scope="module", params=["untied", "tied"])
def case(request, tmp_path_factory):
    return make_case(tmp_path_factory.mktemp(request.param), tie=request.param == "tied")


@pytest.fixture(scope="module")
def expected(case):
    return {"fusesft": twin(case, SFT), "fusepo": twin(case, DPO)}


def check(ranks, expected, config, world, reference_dir):
    return compare(ranks.run(loss_and_gradients, world, config, str(reference_dir)), expected)


def compare(results, expected):
    """The ranks' losses, gradient norms and (rank 0) gradients with the twin's."""
    loss, grads = expected
    norm = sum(g.square().sum() for g in grads.values()).sqrt().item()
    for actual_loss, _, actual_norm, *_ in results:
        assert actual_loss == pytest.approx(loss, rel=BOUND)
        assert actual_norm == pytest.approx(norm, rel=BOUND)
    if results[0][3] is not None:
        assert worst_relative_error(results[0][3], grads) <= BOUND
    return results[0]


@pytest.mark.parametrize("stage", ["fusesft", "fusepo"])
@pytest.mark.parametrize("tp,pp,dp,sp", LAYOUTS)
def test_layout_parity(ranks, case, expected, tmp_path, stage, tp, pp, dp, sp):
    config = make_config(case, SFT if stage == "fusesft" else DPO, tp=tp, pp=pp, sp=bool(sp))
    check(ranks, expected[stage], config, tp * pp * dp, tmp_path / "reference")


@pytest.mark.parametrize("reduction", ["token_sum", "weighted_token_mean"])
def test_the_other_reductions(ranks, case, tmp_path, reduction):
    objective = SFT | {"nll_reduction": reduction}
    config = make_config(case, objective, tp=1, pp=2)
    check(ranks, twin(case, objective), config, 2, tmp_path)


VARIANTS = {
    "unpacked": (dict(packing=False, rows=2, seq_length=96), 2),
    "prefix shared": (dict(share="on", rows=2), 1),
    "prefix shared, tp2 sp": (dict(share="on", rows=1, tp=2, sp=True), 2),
    "one row a micro-batch": (dict(rows=1, seq_length=320), 1),
    "four rows a micro-batch": (dict(rows=4), 1),
    "distributed optimizer": (dict(distopt=True, tp=1), 2),
    "full recompute, tp2 sp": (dict(recompute="full", tp=2, sp=True), 2),
    "selective recompute": (dict(recompute="selective"), 1),
    "pp2 vpp2 dp2, distributed optimizer": (dict(pp=2, vpp=2, distopt=True, overlap=True), 4),
    "tp2 pp2 vpp2 sp, prefix shared, full recompute": (
        dict(tp=2, pp=2, vpp=2, sp=True, share="on", recompute="full"),
        4,
    ),
    "cp2 dp2, distributed optimizer": (dict(cp=2, distopt=True, overlap=True), 4),
    "cp3, unpacked, selective recompute": (dict(cp=3, packing=False, seq_length=96, recompute="selective"), 3),
}


@pytest.mark.parametrize("stage", ["fusesft", "fusepo"])
@pytest.mark.parametrize("name", VARIANTS)
def test_packing_micro_batches_and_recompute_change_nothing(ranks, case, expected, tmp_path, stage, name):
    changes, world = VARIANTS[name]
    config = make_config(case, SFT if stage == "fusesft" else DPO, **changes)
    check(ranks, expected[stage], config, world, tmp_path / "reference")


def test_variants_differ_in_micro_batches(ranks, case, tmp_path):
    counts = {n: check_count(ranks, case, changes, world, tmp_path) for n, (changes, world) in VARIANTS.items()}
    assert counts["unpacked"] > counts["one row a micro-batch"] > counts["four rows a micro-batch"]


def check_count(ranks, case, changes, world, tmp_path):
    return ranks.run(loss_and_gradients, world, make_config(case, SFT, **changes), str(tmp_path))[0][4]


FAULTS = {
    "divide_by_local_count": ("fusesft", dict(tp=1), 2),
    "divide_by_rows": ("fusepo", dict(rows=2), 1),
    "ignore_segments": ("fusesft", dict(rows=2), 1),
    "norm_not_marked": ("fusesft", dict(tp=2, sp=True), 2),
    "no_overlap": ("fusesft", dict(pp=2, vpp=2), 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_negative_controls_break_the_bound(ranks, case, expected, tmp_path, fault):
    """Each planted mistake is one that real trainers have shipped; the comparison above must see it."""
    stage, changes, world = FAULTS[fault]
    config = make_config(case, SFT if stage == "fusesft" else DPO, **changes)
    grads = ranks.run(planted, world, fault, [config], str(tmp_path / "reference"))[0][0][3]
    assert worst_relative_error(grads, expected[stage][1]) > 100 * BOUND


def planted(fault, configs, reference_dir):
    """The worker with one mistake in it."""
    with mistake(fault):
        return several(configs, reference_dir)
