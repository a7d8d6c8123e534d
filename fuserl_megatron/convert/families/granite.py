"""Granite 3: Llama's layers with four multipliers (of muP): on embeddings, scores, residuals, and under the logits."""

from fuserl_megatron.convert.family import Family, Raw, Traits
from fuserl_megatron.convert.fields import number


def _traits(raw: Raw, num_layers: int, where: str) -> Traits:
    def of(key: str) -> float:
        return float(number(raw.get(key, 1.0), key, where))

    return Traits(
        embedding_scale=of("embedding_multiplier"),
        attention_scale=of("attention_multiplier"),
        residual_scale=of("residual_multiplier"),
        logit_scale=1 / of("logits_scaling"),
    )


FAMILIES = {
    "granite": Family(
        architecture="GraniteForCausalLM",
        default_max_positions=2048,
        reads_attention_bias=True,
        reads_mlp_bias=True,
        traits=_traits,
    )
}
