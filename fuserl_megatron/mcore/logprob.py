"""Token log-probabilities from hidden states, without ever holding the logits of a row.

    log p(y_t) = z_t[y_t] - log sum_v exp z_t[v],   z_t = W h_t

(in some families z_t = cap * tanh(scale * W h_t / cap), `LogitRule`),

computed for chunks of scored tokens, with the vocabulary split over the TP ranks; the backward pass recomputes each
chunk's logits. Extra memory: chunk x vocabulary / TP, instead of all tokens x vocabulary / TP.

Number formats: the product W h is taken and rounded in the format of the weights, as is h itself. With bf16 a logit
near 20 is therefore a multiple of 0.125, and a token's log-probability off by up to some 0.06. Everything after it is
fp32 (fp64 when the model is): maximum, exp, sum, log and the difference; backward, the softmax and the sum of the
weight's gradient over chunks, whose products are again of the weights' format.

Shapes: T scored tokens, H hidden, v rows of the vocabulary on this rank, c tokens of a chunk.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


class LogitRule(NamedTuple):
    """What becomes of W h: times scale, then cap * tanh(. / cap) where there is a cap."""

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """In place, elementwise."""
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """D z / d (W h), where `logits` is z."""
        return self.scale if self.cap is None else (1 - (logits / self.cap).square_()).mul_(self.scale)


AS_THEY_ARE = LogitRule()


def _logits(hidden_cH: torch.Tensor, weight_vH: torch.Tensor, num_valid: int, rule: LogitRule) -> torch.Tensor:
    logits_cv = rule.apply_(_wide(hidden_cH @ weight_vH.t()))
    if num_valid < logits_cv.shape[1]:
        logits_cv[:, max(num_valid, 0) :] = -torch.inf  # padded vocabulary rows do not take part in the softmax
    return logits_cv


class _VocabParallelLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weight_vH, labels_T, first_row, num_valid, group, chunk_size, rule):
        tokens = labels_T.numel()
        wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        logps_T = torch.empty(tokens, dtype=wide, device=hidden_TH.device)
        lse_T = torch.empty_like(logps_T)
        parallel = group is not None and dist.get_world_size(group) > 1
        for start in range(0, tokens, chunk_size):
            part = slice(start, start + chunk_size)
            logits_cv = _logits(hidden_TH[part], weight_vH, num_valid, rule)
            local_c = labels_T[part] - first_row
            mine_c = (local_c >= 0) & (local_c < weight_vH.shape[0])
            target_c = logits_cv.gather(1, local_c.clamp(0, weight_vH.shape[0] - 1)[:, None])[:, 0]
            target_c = target_c.masked_fill(~mine_c, 0)
            peak_c = logits_cv.amax(1)
            if parallel:
                dist.all_reduce(peak_c, op=dist.ReduceOp.MAX, group=group)
            total_c = logits_cv.sub_(peak_c[:, None]).exp_().sum(1)
            if parallel:
                both = torch.stack((total_c, target_c))
                dist.all_reduce(both, group=group)
                total_c, target_c = both
            lse_T[part] = peak_c + total_c.log()
            logps_T[part] = target_c - lse_T[part]
        ctx.save_for_backward(hidden_TH, weight_vH, labels_T, lse_T)
        ctx.rest = (first_row, num_valid, chunk_size, rule)
        return logps_T

    @staticmethod
    def backward(ctx, grad_T):
        hidden_TH, weight_vH, labels_T, lse_T = ctx.saved_tensors
        first_row, num_valid, chunk_size, rule = ctx.rest
        grad_hidden_TH = torch.empty_like(hidden_TH)
        # a frozen matrix (LoRA) is spared the product and its buffer
        grad_weight_vH = torch.zeros_like(weight_vH, dtype=lse_T.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, labels_T.numel(), chunk_size):
            part = slice(start, start + chunk_size)
            logits_cv = _logits(hidden_TH[part], weight_vH, num_valid, rule)
            slope = rule.slope(logits_cv) if rule != AS_THEY_ARE else None
            if isinstance(slope, torch.Tensor) and num_valid < slope.shape[1]:
                slope[:, max(num_valid, 0) :] = 0  # of padded rows it is infinite
            # d logp / d z = onehot - softmax
            grad_cv = logits_cv.sub_(lse_T[part, None]).exp_().mul_(-grad_T[part, None])
            local_c = labels_T[part] - first_row
            mine_c = (local_c >= 0) & (local_c < weight_vH.shape[0])
            index_c1 = local_c.clamp(0, weight_vH.shape[0] - 1)[:, None]
            grad_cv.scatter_add_(1, index_c1, (grad_T[part] * mine_c)[:, None])
            if slope is not None:
                grad_cv.mul_(slope)
            grad_cv = grad_cv.to(hidden_TH.dtype)
            grad_hidden_TH[part] = grad_cv @ weight_vH
            if grad_weight_vH is not None:
                grad_weight_vH += grad_cv.t() @ hidden_TH[part]
        grad_weight = None if grad_weight_vH is None else grad_weight_vH.to(weight_vH.dtype)
        return grad_hidden_TH, grad_weight, None, None, None, None, None, None


def vocab_parallel_logps(
    hidden_TH: torch.Tensor,
    weight_vH: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    first_row: int,
    num_valid: int,
    group: dist.ProcessGroup | None,
    chunk_size: int,
    rule: LogitRule = AS_THEY_ARE,
) -> torch.Tensor:
    """Log p(labels) of each scored token, differentiable in hidden states and output weight.

    Args:
        hidden_TH: hidden states of the scored tokens, equal on every rank of the group.
        weight_vH: this rank's rows of the output matrix.
        labels_T: token ids of the whole vocabulary, int64.
        first_row: vocabulary id of this rank's row 0.
        num_valid: how many of this rank's rows are real (the rest pad the vocabulary).
        group: tensor-parallel group; None for one rank.
        chunk_size: tokens whose logits exist at one time.
        rule: what the model does to its logits.

    Returns:
        [T] as fp32 (fp64 for fp64 input), from logits of the weights' precision. The gradient of hidden_TH holds this
        rank's vocabulary rows only: the caller sums it over the group (copy_to_tensor_model_parallel_region or the
        sequence-parallel gather do).
    """
    return _VocabParallelLogps.apply(hidden_TH, weight_vH, labels_T, first_row, num_valid, group, chunk_size, rule)
