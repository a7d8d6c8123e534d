"""Transformer Engine's layers: names, checkpoint keys, gradients, and a CPU run where the package can be imported."""

import pytest
from fusion_case import DPO, SFT, loss_and_gradients, make_config, twin, worst_relative_error


def test_names_marks_and_keys_are_those_of_the_table(ranks, case):
    import rehearsed

    from fuserl_megatron.convert.names import te_name

    config = rehearsed.config_of(case, SFT)
    ((local, local_keys),) = ranks.run(rehearsed.parameters, 1, config, False)
    ((te, te_keys),) = ranks.run(rehearsed.parameters, 1, config, True)
    assert te == {te_name(name): kind for name, kind in local.items()}
    extra = {key for key in te_keys if key.endswith("_extra_state")}
    assert extra
    assert set(te_keys) - extra == {te_name(key) for key in local_keys if not key.endswith("_extra_state")}


LAYOUTS = {
    "one rank": dict(),
    "recompute selective": dict(recompute="selective"),
    "recompute full": dict(recompute="full"),
    "TP2": dict(tp=2),
    "TP2 SP full": dict(tp=2, sp=True, recompute="full"),
    "PP2": dict(pp=2),
    "CP2": dict(cp=2),
}


@pytest.fixture(scope="module")
def expected(case):
    return {objective["stage"]: twin(case, objective) for objective in (SFT, DPO)}


@pytest.mark.parametrize("objective", [SFT, DPO], ids=["sft", "dpo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_gradients_equal_the_float64_twin(ranks, case, expected, tmp_path, objective, layout):
    import rehearsed

    sizes = LAYOUTS[layout]
    world = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("cp", 1)
    config = rehearsed.config_of(case, objective, **sizes)
    loss, _, grads, calls = ranks.run(rehearsed.gradients, world, config, str(tmp_path))[0]
    assert calls["generic_gemm"] and calls["rmsnorm_fwd"] and calls["rmsnorm_bwd"]  # by the real package's functions
    assert loss == pytest.approx(expected[objective["stage"]][0], rel=1e-5)
    assert worst_relative_error(grads, expected[objective["stage"]][1]) <= 1e-5


def test_packed_attention_equals_the_float64_twin(ranks, case, expected, tmp_path):
    """attention_backend=te; it knows no shared prefixes."""
    import rehearsed

    config = rehearsed.config_of(case, DPO, share="off")
    ((loss, _, grads, _),) = ranks.run(rehearsed.gradients, 1, config, str(tmp_path), "te")
    assert loss == pytest.approx(expected["fusepo"][0], rel=1e-5)
    assert worst_relative_error(grads, expected["fusepo"][1]) <= 1e-5


def test_flex_attention_takes_what_it_is_called_with():
    import inspect

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    inspect.signature(create_block_mask).bind(1, 1, None, 1, 1, device="cuda", _compile=True)
    inspect.signature(flex_attention).bind(1, 1, 1, score_mod=None, block_mask=1, scale=1.0, enable_gqa=True)


def trained_on_the_cpu(config):
    import transformer_engine.pytorch  # noqa: F401  core takes its Adam and its norms then
    from test_resume_and_export import run

    return run(config), "twins" in __import__("sys").modules


@pytest.mark.parametrize("distopt", [False, True])
def test_a_run_on_the_cpu_where_the_package_is_installed(case, tmp_path, distopt):
    """No twin, no patch: what a user sees who trains on the CPU of a GPU machine."""
    from fuserl_megatron.testing.distributed import Ranks

    config = make_config(
        case, SFT, results_dir=str(tmp_path), precision="bf16", distopt=distopt, max_steps=2, recompute="full"
    )
    with Ranks() as untouched:
        assert untouched.run(trained_on_the_cpu, 1, config) == [(0, False)]
        if not distopt:
            ((loss, *_),) = untouched.run(loss_and_gradients, 1, make_config(case, SFT), str(tmp_path / "reference"))
            assert loss == pytest.approx(twin(case, SFT)[0], rel=1e-5)
