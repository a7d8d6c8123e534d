"""SmolLM3: Llama's layers, every fourth of them without positions (NoPE, arXiv 2501.18795)."""

from fuserl_megatron.convert.family import Family, Raw, Traits
from fuserl_megatron.convert.fields import layer_list, positive_int


def _with_rope(raw: Raw, num_layers: int, where: str) -> list[bool]:
    listed = layer_list(raw, "no_rope_layers", num_layers, (0, 1), where)  # 1: the layer does rotate
    if listed is not None:
        return [bool(flag) for flag in listed]
    interval = positive_int(raw, "no_rope_layer_interval", where, 4)
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]


def _traits(raw: Raw, num_layers: int, where: str) -> Traits:
    with_rope = _with_rope(raw, num_layers, where)
    return Traits(layers_without_rope=frozenset(i for i, rotates in enumerate(with_rope) if not rotates))


def _sliding(raw: Raw, num_layers: int, where: str) -> list[bool]:
    return [not rotates for rotates in _with_rope(raw, num_layers, where)]


FAMILIES = {
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        default_max_positions=32768,
        default_kv_heads=4,
        default_rope_theta=2000000.0,
        default_tied=True,
        reads_attention_bias=True,
        reads_mlp_bias=True,
        sliding_flag="use_sliding_window",
        sliding_layers=_sliding,
        traits=_traits,
    )
}
