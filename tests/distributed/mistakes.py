"""Mistakes to be planted: what compares numbers must see them."""

from unittest import mock


def mistake(fault):
    """A context in which the product makes one mistake that real trainers have shipped."""
    from fuserl_megatron.mcore import layer, lora, model, step
    from fuserl_megatron.objectives.batch_loss import BatchLoss

    visible, original_loss, core_config = step.Visibility, BatchLoss.__call__, model.TransformerConfig

    def wrong_loss(self, logps_N, batch, values):
        total, metrics = original_loss(self, logps_N, batch, values)
        local = len(set(batch.prompt_ids_N.tolist())) if fault == "divide_by_local_count" else batch.num_sequences
        return total * 7 / max(local, 1) / 2, metrics  # 7 prompts, 2 ranks or pairs

    def without_overlap(**fields):
        return core_config(**fields | dict(overlap_p2p_comm=False, batch_p2p_comm=True))

    class Unmarked(layer.RMSNorm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.weight.sequence_parallel = False

    class UnmarkedAdapter(lora.Adapter):
        def __init__(self, *args):
            super().__init__(*args)
            for parameter in self.parameters():
                parameter.sequence_parallel = False

    return {
        "lora_gradient_not_summed": mock.patch.object(lora, "copy_to_tensor_model_parallel_region", lambda low: low),
        "lora_factor_not_marked": mock.patch.object(lora, "Adapter", UnmarkedAdapter),
        "divide_by_local_count": mock.patch.object(BatchLoss, "__call__", wrong_loss),
        "divide_by_rows": mock.patch.object(BatchLoss, "__call__", wrong_loss),
        "ignore_segments": mock.patch.object(step, "Visibility", lambda s, _, *rest: visible(s * 0, s * 0, *rest)),
        "norm_not_marked": mock.patch.object(layer, "RMSNorm", Unmarked),
        "no_overlap": mock.patch.object(model, "TransformerConfig", without_overlap),
    }[fault]
