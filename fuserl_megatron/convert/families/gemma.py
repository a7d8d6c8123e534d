"""Gemma 2 and Gemma 3 (text): norms around attention and MLP, scaled embeddings, alternating sliding windows; soft caps
on scores and logits (2), norms on each head of q and k and two RoPE bases (3)."""

from dataclasses import replace

from fuserl_megatron.convert.family import Family, Raw, Traits
from fuserl_megatron.convert.fields import number, positive_int
from fuserl_megatron.util.errors import UserError

_NAMES = {
    "pre_mlp_layernorm.weight": ("pre_feedforward_layernorm.weight",),
    "self_attn_bda.norm.weight": ("post_attention_layernorm.weight",),
    "mlp_bda.norm.weight": ("post_feedforward_layernorm.weight",),
}


def _traits(raw: Raw, where: str, caps: tuple[float | None, float | None]) -> Traits:
    """Both generations'; `caps`: of scores and logits where the file is silent."""
    if raw.get("use_bidirectional_attention"):
        raise UserError(f"{where}: use_bidirectional_attention is not supported: training needs causal attention")

    def cap(key: str, default: float | None) -> float | None:
        value = raw.get(key, default)
        return None if value is None else float(number(value, key, where))

    return Traits(
        activation="gelu_tanh",
        norm_adds_one=True,
        output_norms=True,
        embedding_scale=positive_int(raw, "hidden_size", where) ** 0.5,
        attention_scale=float(number(raw.get("query_pre_attn_scalar", 256), "query_pre_attn_scalar", where)) ** -0.5,
        attention_cap=cap("attn_logit_softcapping", caps[0]),
        logit_cap=cap("final_logit_softcapping", caps[1]),
    )


def _gemma2(raw: Raw, num_layers: int, where: str) -> Traits:
    return _traits(raw, where, (50.0, 30.0))


def _gemma3(raw: Raw, num_layers: int, where: str) -> Traits:
    return _traits(raw, where, (None, None))


def _every_other(raw: Raw, num_layers: int, where: str) -> list[bool]:
    return [layer % 2 == 0 for layer in range(num_layers)]


def _five_of_six(raw: Raw, num_layers: int, where: str) -> list[bool]:
    pattern = positive_int(raw, "sliding_window_pattern", where, 6)
    return [(layer + 1) % pattern != 0 for layer in range(num_layers)]


def _two_ropes(raw: Raw) -> tuple[Raw, Raw | None]:
    """Full layers rotate with rope_theta and the scaling, sliding ones with rope_local_base_freq and none."""
    given = raw.get("rope_parameters")
    rest = {key: value for key, value in raw.items() if key not in ("rope_parameters", "rope_scaling", "rope_theta")}
    local = {**rest, "rope_theta": raw.get("rope_local_base_freq", 10000.0)}
    if isinstance(given, dict) and {"full_attention", "sliding_attention"} & set(given):
        whole = {**rest, "rope_theta": 1000000.0, "rope_parameters": given.get("full_attention")}
        return whole, {**local, "rope_parameters": given.get("sliding_attention")}
    return raw, local


_GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    default_max_positions=8192,
    default_kv_heads=4,
    default_head_dim=256,
    default_tied=True,
    activation_field="hidden_activation",
    reads_attention_bias=True,
    default_sliding_window=4096,
    sliding_layers=_every_other,
    traits=_gemma2,
    names=_NAMES,
)
FAMILIES = {
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2,
        architecture="Gemma3ForCausalLM",
        default_max_positions=131072,
        default_rope_theta=1000000.0,
        qk_norm=True,
        sliding_layers=_five_of_six,
        traits=_gemma3,
        ropes=_two_ropes,
    ),
}
