"""Mistakes to be planted: what compares numbers must see them."""

from unittest import mock


def mistake(fault):
    """A context in which the product makes one mistake that real trainers have shipped."""
    from fuserl_megatron.mcore import model, step

    visible, original_loss, core_config = step.Visibility, step.batch_loss, model.TransformerConfig

    def wrong_loss(objective, logps_N, batch, sources, values):
        total, metrics = original_loss(objective, logps_N, batch, sources, values)
        local = len(set(batch.prompt_ids_N.tolist())) if fault == "divide_by_local_count" else batch.num_sequences
        return total * 7 / max(local, 1) / 2, metrics  # 7 prompts, 2 ranks or pairs

    def without_overlap(**fields):
        return core_config(**fields | dict(overlap_p2p_comm=False, batch_p2p_comm=True))

    class Unmarked(model.RMSNorm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.weight.sequence_parallel = False

    return {
        "divide_by_local_count": mock.patch.object(step, "batch_loss", wrong_loss),
        "divide_by_rows": mock.patch.object(step, "batch_loss", wrong_loss),
        "ignore_segments": mock.patch.object(step, "Visibility", lambda s, _, *rest: visible(s * 0, s * 0, *rest)),
        "norm_not_marked": mock.patch.object(model, "RMSNorm", Unmarked),
        "no_overlap": mock.patch.object(model, "TransformerConfig", without_overlap),
    }[fault]
