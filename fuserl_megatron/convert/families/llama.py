"""Llama 2, 3, 3.1, 3.2, and the many models that keep its layers (SmolLM2, DeepSeek-R1 distills, ...)."""

from fuserl_megatron.convert.family import Family

FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM", default_max_positions=2048, reads_attention_bias=True, reads_mlp_bias=True
    )
}
