"""OLMo 2: no norms before attention and MLP but after them, and norms over all heads of q and of k."""

from fuserl_megatron.convert.family import Family, Raw, Traits


def _traits(raw: Raw, num_layers: int, where: str) -> Traits:
    return Traits(input_norms=False, output_norms=True, qk_norm_whole=True)


FAMILIES = {
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        default_max_positions=2048,
        default_rms_norm_eps=1e-5,
        reads_attention_bias=True,
        traits=_traits,
        names={
            "self_attn_bda.norm.weight": ("post_attention_layernorm.weight",),
            "mlp_bda.norm.weight": ("post_feedforward_layernorm.weight",),
        },
    )
}
