"""Loss and gradients are the same numbers under every layout, and those of a plain float64 twin (<= 1e-5 relative)."""

import pytest
from fusion_case import DPO, SFT, loss_and_gradients, make_case, make_config, twin, worst_relative_error

BOUND = 1e-5
# tp, pp, dp, sequence parallel
LAYOUTS = [(1, 1, 1, 0), (1, 1, 2, 0), (2, 1, 1, 0), (2, 1, 1, 1), (1, 2, 1, 0), (2, 2, 1, 0), (2, 2, 1, 1), (2, 1, 2, 1)]


@pytest.fixture(scope="module", params=["untied", "tied"])
def case(request, tmp_path_factory):
    return make_case(tmp_path_factory.mktemp(request.param), tie=request.param == "tied")


@pytest.fixture(scope="module")
def expected(case):
    return {"fusesft": twin(case, SFT), "fusepo": twin(case, DPO)}


def check(ranks, expected, config, world, reference_dir):
    results = ranks.run(loss_and_gradients, world, config, str(reference_dir))
    loss, grads = expected
    norm = sum(g.square().sum() for g in grads.values()).sqrt().item()
    for actual_loss, _, actual_norm, _, _ in results:
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
