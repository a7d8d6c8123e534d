"""Sequence sums and the stable elementary functions, against plain loops and against float64 identities."""

import math

import pytest
import torch

from fuserl_megatron.objectives.logps import log1mexp, mean_logps, sequence_logps


def test_sums_equal_a_plain_loop_whatever_the_order_of_the_tokens():
    generator = torch.Generator().manual_seed(0)
    token_logps_T = -torch.rand(40, generator=generator)
    sequence_ids_T = torch.randint(0, 5, (40,), generator=generator)
    expected = [sum(float(x) for x, i in zip(token_logps_T, sequence_ids_T, strict=True) if i == n) for n in range(6)]
    actual = sequence_logps(token_logps_T, sequence_ids_T, 6)
    assert actual.tolist() == pytest.approx(expected, abs=1e-12)
    assert actual[5].item() == 0.0  # a sequence without a token here
    order = torch.randperm(40, generator=generator)
    torch.testing.assert_close(sequence_logps(token_logps_T[order], sequence_ids_T[order], 6), actual)
    # Parts (rows, context-parallel ranks) add up.
    parts = sequence_logps(token_logps_T[:17], sequence_ids_T[:17], 6) + sequence_logps(
        token_logps_T[17:], sequence_ids_T[17:], 6
    )
    torch.testing.assert_close(parts, actual)


def test_low_precision_tokens_are_summed_in_float64():
    token_logps_T = torch.full((4096,), -0.1, dtype=torch.bfloat16)
    ids_T = torch.zeros(4096, dtype=torch.int64)
    exact = 4096 * float(token_logps_T[0])
    assert sequence_logps(token_logps_T, ids_T, 1).item() == pytest.approx(exact, abs=1e-9)
    in_bfloat16 = token_logps_T.new_zeros(1).index_add(0, ids_T, token_logps_T)  # negative control: sticks far above
    assert abs(in_bfloat16.item() - exact) > 10


def test_the_gradient_of_a_sum_reaches_each_token_in_its_own_type():
    token_logps_T = torch.zeros(4, dtype=torch.float32, requires_grad=True)
    logps_N = sequence_logps(token_logps_T, torch.tensor([1, 0, 1, 1]), 2)
    (logps_N * torch.tensor([2.0, 3.0])).sum().backward()
    assert token_logps_T.grad.tolist() == [3.0, 2.0, 3.0, 3.0]
    assert token_logps_T.grad.dtype == torch.float32


def test_no_scored_token_at_all_still_has_a_graph():
    token_logps_T = torch.zeros(0, requires_grad=True)
    logps_N = sequence_logps(token_logps_T, torch.zeros(0, dtype=torch.int64), 3)
    assert logps_N.tolist() == [0.0, 0.0, 0.0]
    logps_N.sum().backward()
    assert token_logps_T.grad.shape == (0,)


def test_the_mean_of_an_empty_padding_sequence_is_zero():
    assert mean_logps(torch.tensor([-12.0, 0.0]), torch.tensor([4, 0])).tolist() == [-3.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_sigmoid_stays_finite_with_its_gradient(dtype):
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], dtype=dtype, requires_grad=True)
    y = torch.nn.functional.logsigmoid(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert y[0].item() == -1e4 and y[2].item() == pytest.approx(-math.log(2)) and y[4].item() == 0.0
    assert x.grad[0].item() == 1.0 and x.grad[4].item() == 0.0
    # Negative control: the textbook form is infinite there.
    assert torch.log(torch.sigmoid(x.detach()))[0].item() == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_over_its_whole_range(dtype):
    x = torch.tensor([-1e4, -50.0, -5.0, -0.7, -0.6931, -0.1, -1e-6, 0.0], dtype=dtype, requires_grad=True)
    y = log1mexp(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    for value, actual in zip(x.tolist()[:-1], y.tolist()[:-1], strict=True):
        expected = math.log(-math.expm1(value))
        assert actual == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-13)
    naive = torch.log(1 - torch.exp(torch.tensor(-1e-6, dtype=torch.float32)))  # negative control: digits lost
    assert abs(naive.item() - math.log(-math.expm1(-1e-6))) > 1e-3


def test_log1mexp_gradcheck():
    x = torch.tensor([-30.0, -3.0, -0.7, -0.69, -0.2, -1e-3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log1mexp, x)
