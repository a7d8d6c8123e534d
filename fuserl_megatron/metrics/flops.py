"""How much work a step is and how fast it went: pure arithmetic on counts of tokens, seconds and a table of peaks.

Model FLOPs are the multiplications and additions of the matrix products that the mathematics asks for, 2 m n k each:
the positions that are not padding, a shared prefix once, each position's attention over the keys it sees and no
others, the vocabulary product of the scored positions alone. The backward pass is twice the forward pass. What is
computed again (activation recompute, the logits of the chunked log-probabilities), what is masked away, padding and
the reference model's passes are work of the machine, not of the model: they do not count.

    forward = T (2 L (H (A + 2 G) D + A D H + 3 H F)) + 4 L A D K + 2 H V C          step = 3 x forward

With LoRA the matrices are frozen and have no gradient of their own, a third of the work of every product with them;
the adapter's R numbers cost 6 R T.

T positions, K keys seen by all of them, C scored positions, L layers, H hidden, A heads, G key/value heads, D head
dimension, F MLP channels, V vocabulary.
"""

import functools
import re
from collections.abc import Mapping

from fuserl_megatron.convert.hf_config import ModelShape

PEAKS = {
    r"A100": {"bf16": 312.0, "32": 19.5},
    r"H100(?!.*(PCIe|NVL))": {"bf16": 989.5, "fp8": 1979.0, "32": 67.0},
    r"H200(?!.*NVL)": {"bf16": 989.5, "fp8": 1979.0, "32": 67.0},
    r"\bB200": {"bf16": 2250.0, "fp8": 4500.0},
}
"""Dense peaks in TFLOP/s by number format, from NVIDIA's data sheets of the SXM cards (fp32 without tensor cores); the
key is searched for in the name that the driver gives."""


def step_flops(shape: ModelShape, tokens: int, attended_keys: int, scored_tokens: int, adapter: int = 0) -> int:
    """Model FLOPs of forward and backward pass.

    Args:
        shape: the model.
        tokens: positions that are not padding.
        attended_keys: sum over these positions of the keys each sees (`data.packing.attended_keys`).
        scored_tokens: positions whose logits are needed.
        adapter: numbers of a LoRA adapter, 0 where all weights are trained.
    """
    width = shape.num_attention_heads * shape.head_dim
    key_value_width = 2 * shape.num_query_groups * shape.head_dim
    layer = shape.hidden_size * (2 * width + key_value_width) + 3 * shape.hidden_size * shape.ffn_hidden_size
    linear = 2 * shape.num_layers * layer * tokens
    attention = 4 * shape.num_layers * width * attended_keys
    vocabulary = 2 * shape.hidden_size * shape.vocab_size * scored_tokens
    passes = 2 if adapter else 3
    return passes * (linear + vocabulary) + 3 * attention + 6 * adapter * tokens


@functools.cache
def peak_tflops(device_name: str | None, number_format: str) -> float | None:
    """Dense peak of one device in TFLOP/s; None where it is not known.

    Args:
        device_name: as torch.cuda.get_device_name gives it; None for the CPU.
        number_format: trainer.precision, or a name that begins with fp8.
    """
    for pattern, peaks in PEAKS.items():
        if device_name is not None and re.search(pattern, device_name):
            return peaks.get("fp8" if number_format.startswith("fp8") else number_format)
    return None


def describe_peak(device_name: str | None, number_format: str) -> str:
    """One phrase for the start of a run."""
    peak = peak_tflops(device_name, number_format)
    if device_name is None:
        return "no MFU on a CPU"
    if peak is None:
        return f"no MFU: the {number_format} peak of {device_name} is not in the table"
    return f"MFU against {peak:g} TFLOP/s (dense {number_format} peak of {device_name})"


def rates(
    seconds: float, flops: int, prompts: int, real_tokens: int, world_size: int, peak: float | None
) -> dict[str, float]:
    """What a step's line says of its speed. flops, prompts and real_tokens (all but padding) are those of the global
    batch; peak is one device's in TFLOP/s, None where it is not known: there is no MFU then."""
    tflops = flops / seconds / world_size / 1e12
    found = dict(
        tokens_per_second=real_tokens / seconds, groups_per_second=prompts / seconds, model_tflops_per_device=tflops
    )
    return found if peak is None else found | {"mfu": tflops / peak}


def time_split(seconds: float, parts: Mapping[str, float]) -> dict[str, float]:
    """A step's seconds by part, and what is left (logging, checks, metrics) as `seconds_other`.

    Gradient synchronisation lies inside the forward-backward schedule: it is taken out of it and given apart.
    """
    sync, schedule = parts.get("gradient_sync", 0.0), parts.get("forward_backward", 0.0)
    split = {
        "seconds_data": parts.get("data", 0.0),
        "seconds_forward_backward": schedule - sync,
        "seconds_gradient_sync": sync,
        "seconds_optimizer": parts.get("optimizer", 0.0),
    }
    return split | {"seconds_other": max(seconds - sum(split.values()), 0.0)}
