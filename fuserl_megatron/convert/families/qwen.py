"""Qwen 2, 2.5 and 3: biases on q, k and v (2), norms on each head of q and k (3), sliding upper layers on request."""

from fuserl_megatron.convert.family import Family, Raw
from fuserl_megatron.util.errors import UserError


def _from_max_window_layers(raw: Raw, num_layers: int, where: str) -> list[bool]:
    first = raw.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):
        raise UserError(f"{where}: max_window_layers = {first!r} must be an integer")
    return [layer >= first for layer in range(num_layers)]


FAMILIES = {
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        default_max_positions=32768,
        default_kv_heads=32,
        always_qkv_bias=True,
        sliding_flag="use_sliding_window",
        default_sliding_window=4096,
        sliding_layers=_from_max_window_layers,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        default_max_positions=32768,
        default_kv_heads=32,
        default_head_dim=128,
        reads_attention_bias=True,
        qk_norm=True,
        sliding_flag="use_sliding_window",
        default_sliding_window=4096,
        sliding_layers=_from_max_window_layers,
    ),
}
