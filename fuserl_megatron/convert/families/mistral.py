"""Mistral 7B and its successors: Llama's layers, with a sliding window in the early ones."""

from fuserl_megatron.convert.family import Family, every_layer

FAMILIES = {
    "mistral": Family(
        architecture="MistralForCausalLM",
        default_max_positions=131072,
        default_kv_heads=8,
        default_sliding_window=4096,
        sliding_layers=every_layer,
    )
}
