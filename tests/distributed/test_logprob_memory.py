"""The chunked log-probabilities against the plain path at Llama 3's vocabulary: same numbers, a tenth of the memory.

Memory is what tensors hold: a dispatch mode sees every tensor that an operator makes, and a storage counts from then
until it is freed. Counted is everything made by forward and backward, the gradients included; the inputs are not.

Shapes: T scored tokens, H hidden, V vocabulary, v its rows on this rank.
"""

import pytest

V, H, T, CHUNK = 128256, 16, 1024, 16


def peak_bytes(function):
    """Result of function() and the most bytes that tensors made in it held at one time."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    live, peak, now = {}, 0, 0

    def forget(key):
        nonlocal now
        now -= live.pop(key)

    class Meter(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            nonlocal peak, now
            known = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)}
            out = operator(*args, **kwargs or {})
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in live and storage._cdata not in known:
                        live[storage._cdata] = storage.nbytes()
                        now += storage.nbytes()
                        weakref.finalize(storage, forget, storage._cdata)
            peak = max(peak, now)
            return out

    with Meter():
        result = function()
    return result, peak


def both_paths(tp, chunk=CHUNK):
    """For plain and chunked: log-probabilities, gradients of hidden states (summed over TP) and weight, peak bytes."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from fuserl_megatron.config.schema import ModelConfig, TrainerConfig
    from fuserl_megatron.mcore import parallel
    from fuserl_megatron.mcore.logprob import vocab_parallel_logps

    layout = parallel.initialize(ModelConfig(tensor_model_parallel_size=tp), TrainerConfig())
    group, rows = ps.get_tensor_model_parallel_group(), V // tp
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(T, H, generator=generator)
    weight_VH = torch.randn(V, H, generator=generator) * 0.5
    labels_T = torch.randint(0, V, (T,), generator=generator)
    factors_T = torch.randn(T, generator=generator)
    first = layout.tp_rank * rows

    def plain(hidden_TH, weight_vH):
        logits_TV = hidden_TH @ weight_vH.t()
        if tp == 1:
            return logits_TV.log_softmax(-1).gather(1, labels_T[:, None])[:, 0]
        return -vocab_parallel_cross_entropy(logits_TV[:, None], labels_T[:, None])[:, 0]

    def chunked(hidden_TH, weight_vH):
        return vocab_parallel_logps(
            hidden_TH, weight_vH, labels_T, first_row=first, num_valid=rows, group=group, chunk_size=chunk
        )

    found = []
    for path in (plain, chunked):
        hidden, weight = hidden_TH.clone().requires_grad_(), weight_VH[first : first + rows].clone().requires_grad_()

        def step(path=path, hidden=hidden, weight=weight):
            logps_T = path(hidden, weight)
            (factors_T * logps_T).sum().backward()
            return logps_T.detach()

        logps_T, peak = peak_bytes(step)
        dist.all_reduce(hidden.grad, group=group)
        found.append((logps_T, hidden.grad, weight.grad, peak))
    # whole tensors would go through a pipe: compare here
    (*expected, plain_peak), (*actual, chunked_peak) = found
    errors = [((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)]
    return errors, chunked_peak, plain_peak


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tenth_of_the_memory_and_the_same_numbers(ranks, tp):
    for errors, chunked_peak, plain_peak in ranks.run(both_paths, tp, tp):
        assert max(errors) <= 1e-5
        assert plain_peak >= T * V // tp * 4  # the meter has seen the logits
        print(f"TP {tp}: {chunked_peak / 1e6:.1f} MB of {plain_peak / 1e6:.1f} MB")
        assert chunked_peak <= 0.1 * plain_peak


def test_the_meter_sees_a_chunk_of_all_tokens(ranks):
    """Control: with one chunk the logits of all tokens exist, and the bound breaks."""
    ((_, chunked_peak, plain_peak),) = ranks.run(both_paths, 1, 1, T)
    assert chunked_peak > 0.3 * plain_peak
