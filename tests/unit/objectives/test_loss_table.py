"""The table of losses and the terms made of them: complete, strict, and equal to the functions it names."""

import math
from types import SimpleNamespace

import pytest
import torch

from fuserl_megatron.objectives import LOSSES, group_losses, preference
from fuserl_megatron.objectives.terms import preference_terms

REQUIRED = {"cdpo": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}
NO_SFT_TERM = {"mpo": {"rpo_alpha": 0.0}}  # the only loss that has one by default
OTHER_VALUES = {"length_normalized": False, "fusion": "mean", "label_smoothing": 0.3, "alpha_end": 0.5}


def full_inputs(policy_logps_N=None):
    """Four sequences, two pairs, with every field any loss may want."""
    generator = torch.Generator().manual_seed(5)

    def rand(*shape):
        return -10 * (0.1 + torch.rand(*shape, generator=generator, dtype=torch.float64))

    logps_N, reference_N = rand(4), rand(4)
    return SimpleNamespace(
        policy_logps_N=logps_N if policy_logps_N is None else policy_logps_N,
        lengths_N=torch.tensor([3, 5, 4, 6]),
        reference_logps_N=reference_N,
        chosen_index_P=torch.tensor([2, 1]),
        rejected_index_P=torch.tensor([0, 3]),
        source_index_P=torch.tensor([3, 0]),
        alpha=0.1,
        reward_gaps_P=torch.tensor([0.2, 0.7], dtype=torch.float64),
        source_chosen_mean_logps_PK=rand(2, 2) / 4,
        source_rejected_mean_logps_PK=rand(2, 2) / 4,
        source_present_PK=torch.tensor([[True, True], [False, True]]),
        group_ids_N=torch.tensor([0, 1, 0, 1]),
        advantages_N=torch.tensor([-1.0, 0.5, 1.0, -0.5], dtype=torch.float64),
        best_N=torch.tensor([False, True, True, False]),
        desirable_N=torch.tensor([False, True, True, False]),
        kl=0.25,
    )


def replace(inputs, **changes):
    return SimpleNamespace(**{**vars(inputs), **changes})


def terms(loss, inputs=None, **options):
    inputs = inputs or full_inputs()
    spec, options = LOSSES[loss], LOSSES[loss].complete({**REQUIRED.get(loss, {}), **options})
    return preference_terms(spec, options, inputs.policy_logps_N, inputs, alpha=inputs.alpha, kl=inputs.kl)


def test_every_loss_is_in_the_table():
    assert all(spec.name == name for name, spec in LOSSES.items()) and len(LOSSES) == 22
    assert {loss for loss, spec in LOSSES.items() if "reference" not in spec.needs} == {"simpo", "cpo", "orpo"}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_option_of_every_loss_changes_its_numbers(loss):
    """No option parses and does nothing."""
    before = terms(loss).losses_I
    for option in LOSSES[loss].options:
        if loss == "wrpo" and option == "alpha_end":
            continue  # read by wrpo_alpha, tested there; the loss is given alpha itself
        value = OTHER_VALUES[option] if option in OTHER_VALUES else LOSSES[loss].defaults[option] + 0.5
        after = terms(loss, **{option: value}).losses_I
        assert (after - before).abs().max() > 1e-6, option


@pytest.mark.parametrize("loss", LOSSES)
def test_an_option_of_another_loss_is_refused(loss):
    others = {option for spec in LOSSES.values() for option in spec.options} - set(LOSSES[loss].options)
    for option in sorted(others):
        with pytest.raises(ValueError, match=f"does not use the option '{option}'"):
            LOSSES[loss].complete({**REQUIRED.get(loss, {}), option: 0.1})


@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [
        ("dpo", {"bta": 0.1}, "did you mean 'beta'"),
        ("dpo", {"label_smoothing": 0.1}, "does not use"),
        ("robust", {}, "needs the option 'label_smoothing'"),
        ("robust", {"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ("dpo", {"beta": 0.0}, "a positive number"),
        ("dpo", {"beta": math.nan}, "a positive number"),
        ("dpo", {"beta": math.inf}, "a positive number"),
        ("dpo", {"beta": "0.1"}, "a positive number"),
        ("dpo", {"beta": True}, "a positive number"),
        ("wrpo", {"alpha_end": 1.5}, r"\[0, 1\]"),
        ("ipo", {"length_normalized": 1}, "true or false"),
        ("infifpo", {"fusion": "median"}, "max_margin"),
    ],
)
def test_bad_options_get_one_clear_line(loss, options, words):
    with pytest.raises(ValueError, match=words) as error:
        LOSSES[loss].complete(options)
    assert "\n" not in str(error.value)


def test_defaults_fill_what_was_not_given():
    assert LOSSES["simpo"].complete({"beta": 2.5}) == {"beta": 2.5, "gamma_beta_ratio": 0.3, "rpo_alpha": 0.0}


def test_dispatch_gathers_pairs_by_index():
    inputs = full_inputs()
    policy, reference, lengths = inputs.policy_logps_N, inputs.reference_logps_N, inputs.lengths_N
    c, r, s = inputs.chosen_index_P, inputs.rejected_index_P, inputs.source_index_P
    both, reference_both, lengths_both = ((values[c], values[r]) for values in (policy, reference, lengths))
    expected = {
        "dpo": preference.dpo(both, reference_both, beta=0.01),
        "ln_dpo": preference.ln_dpo(both, reference_both, lengths_both, beta=10.0),
        "simpo": preference.simpo(both, lengths_both, beta=10.0, gamma=3.0),
        "cpo": preference.cpo(both, lengths_both, beta=0.1, cpo_alpha=1.0),
        "wrpo": group_losses.wrpo(both, reference_both, policy[s], reference[s], beta=0.01, alpha=0.1),
    }
    for loss, pairs in expected.items():
        actual = terms(loss)
        assert torch.equal(actual.losses_I, pairs.losses_P), loss
        assert torch.equal(actual.metrics["margin"][0], pairs.margins_P), loss


def test_the_sft_term_is_added_to_the_response_that_is_learned():
    inputs = full_inputs()
    nll_N = -inputs.policy_logps_N / inputs.lengths_N
    for loss, expected in {
        "dpo": nll_N[inputs.chosen_index_P],
        "wrpo": nll_N[inputs.source_index_P],
        "rloo": nll_N * inputs.best_N,
        "kto": nll_N * inputs.desirable_N,
    }.items():
        difference = terms(loss, rpo_alpha=2.0).losses_I - terms(loss).losses_I
        torch.testing.assert_close(difference, 2.0 * expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_are_detached_named_and_one_per_item(loss):
    inputs = full_inputs(full_inputs().policy_logps_N.requires_grad_())
    result = terms(loss, inputs)
    assert result.losses_I.requires_grad
    assert set(result.metrics) == set(LOSSES[loss].metric_names)
    for values_I, mask_I in result.metrics.values():
        assert values_I.shape == result.losses_I.shape and not values_I.requires_grad
        assert mask_I is None or mask_I.shape == values_I.shape


def test_rloo_compares_the_best_with_the_worst_of_each_group_and_kto_two_means():
    """Two groups interleaved, the second with equal rewards: nothing to compare there."""
    inputs = replace(
        full_inputs(),
        policy_logps_N=torch.tensor([-5.0, -1.0, -2.0, -7.0, -3.0]).double(),
        lengths_N=torch.tensor([4, 2, 3, 9, 5]),
        reference_logps_N=torch.tensor([-4.0, -1.0, -2.5, -7.0, -1.0]).double(),
        group_ids_N=torch.tensor([1, 0, 1, 0, 1]),
        advantages_N=torch.tensor([0.5, 0.0, -0.1, 0.0, -0.4]).double(),
        best_N=torch.tensor([True, True, False, False, False]),
        desirable_N=torch.tensor([True, False, True, False, False]),
    )

    def means(loss, given):
        found = terms(loss, given).metrics.items()
        return {k: (v if m is None else v[m]).double().mean().item() for k, (v, m) in found}

    rloo = dict(sft_nll=(5 / 4 + 1 / 2) / 2, chosen_length=4, rejected_length=5)
    free = dict(chosen_implicit_reward=-5, rejected_implicit_reward=-3, margin=-2, accuracy=0)
    with_reference = dict(chosen_implicit_reward=-1, rejected_implicit_reward=-2, margin=1, accuracy=1)
    assert means("rloo", replace(inputs, reference_logps_N=None)) == pytest.approx(rloo | free)
    assert means("rloo", inputs) == pytest.approx(rloo | with_reference)
    even = {k: getattr(inputs, k)[:4] for k in ("policy_logps_N", "lengths_N", "reference_logps_N", "desirable_N")}
    kto = means("kto", replace(inputs, **even))
    assert kto["margin"] == pytest.approx(kto["chosen_implicit_reward"] - kto["rejected_implicit_reward"])
    assert kto["margin"] == pytest.approx(0.1 * ((-1 + 0.5) / 2 - 0)) and kto["chosen_length"] == 3.5


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_through_the_dispatch_with_an_sft_term(loss):
    options = {"rpo_alpha": 0.3} if "rpo_alpha" in LOSSES[loss].options else {}
    if loss == "rloo":
        options["kl_coef"] = 0.2
    logps_N = full_inputs().policy_logps_N.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: terms(loss, full_inputs(x), **options).losses_I, logps_N)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_reference_is_asked_for_only_where_the_table_says(loss):
    without = replace(full_inputs(), reference_logps_N=None)
    if LOSSES[loss].uses_reference(LOSSES[loss].complete(REQUIRED.get(loss, {}))):
        with pytest.raises(ValueError, match="reference_logps_N"):
            terms(loss, without)
    else:
        assert torch.equal(terms(loss, without).losses_I, terms(loss).losses_I)
    assert LOSSES["rloo"].uses_reference({"kl_coef": 0.1})


@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_step_has_the_value_the_table_gives(loss):
    inputs = full_inputs()
    inputs = replace(inputs, policy_logps_N=inputs.reference_logps_N, kl=0.0)
    expected = LOSSES[loss].start(LOSSES[loss].complete(REQUIRED.get(loss, {})))
    if expected is None:
        assert loss not in {"dpo", "ln_dpo", "cdpo", "robust", "hinge", "ipo", "mappo", "kto", "wrpo"}
    else:
        actual = terms(loss, inputs, **NO_SFT_TERM.get(loss, {})).losses_I
        torch.testing.assert_close(actual, torch.full_like(actual, expected), atol=1e-12, rtol=0)


def test_a_missing_input_is_named():
    for loss, name in (("mappo", "reward_gaps_P"), ("wrpo", "alpha"), ("kto", "kl")):
        with pytest.raises(ValueError, match=f"{loss} needs {name}"):
            terms(loss, replace(full_inputs(), **{name: None}))
