"""Settings of a LoRA adapter: section adapter. See `schema.py`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fuserl_megatron.config.ranges import Range, at_least, positive

# fmt: off
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# fmt: on
NO_DROPOUT = Range(lambda value: value == 0, "must be 0: nothing in training is random")
SOME = Range(lambda value: len(set(value)) == len(value) > 0, "must name each layer once, and at least one", ["q_proj"])


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A LoRA adapter: the model's own weights stay as they are (docs/lora.md)."""

    kind: Literal["none", "lora"] = "none"
    """none trains all weights; lora trains two small matrices beside each target."""
    rank: Annotated[int, at_least(1)] = 16
    """Rows of A and columns of B."""
    alpha: Annotated[float, positive()] = 32.0
    """What the adapter adds is scaled by alpha / rank."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)."""
    dropout: Annotated[float, NO_DROPOUT] = 0.0
    """0 and nothing else: nothing in training is random."""
    targets: Annotated[tuple[Target, ...], SOME] = TARGETS
    """Linear layers that get an adapter, by their Hugging Face names, in every layer of the model."""
    path: str | None = None
    """PEFT adapter directory to start from; null starts with B = 0. Of a resumed run the checkpoint counts."""
    export: Literal["merged", "adapter"] = "merged"
    """What run.export writes: a Hugging Face model with the adapter merged into its weights (results_dir/hf), or a PEFT
    adapter directory (results_dir/adapter)."""

    @property
    def scale(self) -> float:
        """Of what the adapter adds."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)
