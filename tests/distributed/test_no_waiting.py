"""Between a micro-batch's forward and backward pass nothing asks the device for a value.

Asking makes the host wait until a GPU has done all its work. What asks is seen on the CPU as well: each way of it is an
operation of torch, noticed here by its name.
"""

from unittest import mock

import pytest
from fusion_case import DPO, LOSSES, SFT, loss_and_gradients, make_config

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "is_nonzero", "equal")
"""`item`, `tolist`, `bool()` and `int()` are the first of them."""


def waits(config, reference_dir, mistake=None):
    """Names of all operations that asked, from a micro-batch's hidden states to their gradient."""
    import torch
    from megatron.core import parallel_state as ps
    from torch.utils._python_dispatch import TorchDispatchMode

    from fuserl_megatron.data.batch import IGNORE_INDEX, PackedBatch
    from fuserl_megatron.mcore import step

    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            by_mask = name.startswith(("index", "_index_put")) and any(
                isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)
                for places in args
                if isinstance(places, (list, tuple))
                for i in places
            )
            if by_mask or name.strip("_").startswith(tuple(n.strip("_") for n in ASKING)):
                found.append(name)
            return func(*args, **kwargs or {})

    real = step._run_schedule

    def watched(engine, batches, on_output, forward_only):
        def call(output, batch):
            with Watch():
                loss, *rest = on_output(output, batch)
                if loss.requires_grad:
                    torch.autograd.grad(loss, output, retain_graph=True)
            return loss, *rest

        return real(engine, batches, call, forward_only)

    def by_mask(batch, values):
        return values[batch.labels_BS != IGNORE_INDEX]

    with (
        mock.patch.object(step, "_run_schedule", watched),
        mock.patch.object(PackedBatch, "scored", by_mask if mistake == "a mask" else PackedBatch.scored),
    ):
        loss_and_gradients(config, reference_dir)
    ps.destroy_model_parallel()
    return found


@pytest.mark.parametrize("objective", [SFT, DPO, *LOSSES.values()], ids=["sft", "dpo", *LOSSES])
def test_nothing_asks_the_device(ranks, case, tmp_path, objective):
    assert ranks.run(waits, 1, make_config(case, objective, share="on"), str(tmp_path)) == [[]]


def test_a_mask_is_noticed(ranks, case, tmp_path):
    ((*found,),) = ranks.run(waits, 1, make_config(case, SFT, share="on"), str(tmp_path), "a mask")
    assert found
