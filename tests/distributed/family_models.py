"""Config fields of a tiny model of each family, its oddities far from their neutral values."""

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
MODELS = {
    "mistral": dict(family="mistral", sliding_window=9, rope_parameters=PLAIN),
    "smollm3": dict(family="smollm3", no_rope_layer_interval=2, rope_parameters=PLAIN),
    "granite": dict(
        family="granite",
        rope_parameters=PLAIN,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.4,
        logits_scaling=0.8,
    ),
    "phi3": dict(family="phi3", rope_parameters=PLAIN | {"partial_rotary_factor": 0.5}),
    "olmo2": dict(family="olmo2", rope_parameters=PLAIN),
    "gemma2": dict(
        family="gemma2",
        sliding_window=9,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=6.0,
        query_pre_attn_scalar=20,
        head_dim=16,
        rope_parameters=PLAIN,
    ),
    "gemma3": dict(
        family="gemma3_text",
        sliding_window=9,
        sliding_window_pattern=2,
        query_pre_attn_scalar=20,
        head_dim=16,
    ),
}
