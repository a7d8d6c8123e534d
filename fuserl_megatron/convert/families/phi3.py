"""Phi-3 and Phi-4: Llama's layers, with q, k, v in one tensor and gate, up in another; some rotate part of a head."""

from fuserl_megatron.convert.family import Family, every_layer

FAMILIES = {
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        default_max_positions=4096,
        default_rms_norm_eps=1e-5,
        reads_partial_rotary=True,
        sliding_layers=every_layer,
        names={
            "self_attention.linear_qkv.weight": ("self_attn.qkv_proj.weight",) * 3,
            "mlp.linear_fc1.weight": ("mlp.gate_up_proj.weight",) * 2,
        },
    )
}
