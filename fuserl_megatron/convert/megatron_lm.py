"""The flags under which Megatron-LM computes the model of a checkpoint written here, and what no flag of it can say.

With --use-checkpoint-args it takes sizes, biases, RoPE base, vocabulary and the like from the checkpoint, but not all:
without --qk-layernorm, --norm-epsilon or the RoPE scaling it loads "successfully" and computes another model. Checked
against its loader at commit d98e8a64 (core 0.20); figures in docs/conversion.md.
"""

import shlex
from pathlib import Path

import torch

from fuserl_megatron.convert.family import Traits
from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.convert.rope import RopeParameters

FLAGS_FILE = "megatron_lm_flags.txt"
# constants in Megatron-LM's Llama 3 scaling; it reads --rope-scaling-factor and hands it to no model
_LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def megatron_lm_flags(shape: ModelShape, dtype: torch.dtype, checkpoint: str | Path) -> tuple[list[str], list[str]]:
    """The words of the command line, and a sentence for each thing that they do not say.

    Args:
        shape: of the model.
        dtype: of the checkpoint's weights.
        checkpoint: its root folder, which holds the tokenizer in `hf`.

    Returns:
        Words of Megatron-LM's command line, unquoted; sentences, none where it computes the same model.
    """
    words = ["--load", str(checkpoint), "--use-checkpoint-args", "--no-load-optim", "--no-load-rng"]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(Path(checkpoint) / "hf")]
    words += ["--norm-epsilon", repr(float(shape.rms_norm_eps))]
    if shape.rotary_dim != shape.head_dim:
        words += ["--rotary-percent", repr(shape.rotary_dim / shape.head_dim)]
    words += ["--qk-layernorm"] if shape.qk_norm else []
    words += {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}.get(dtype, [])
    rope_words, problems = _rope(shape.rope)
    problems += _traits(shape)
    if shape.sliding_window is not None:
        problems.append(
            f"its attention is full, the model's has a window of {shape.sliding_window} tokens: the same for sequences "
            "of up to so many"
        )
    return words + rope_words, problems


def _traits(shape: ModelShape) -> list[str]:
    """What Megatron-LM's command line has no word for."""
    ours, plain = vars(shape.traits), vars(Traits())
    said = [f"{name} {value}" for name, value in ours.items() if value != plain[name]]
    if shape.local_rope is not None:
        said.append("another RoPE in the layers that slide")
    return [f"it would build plain layers, and this {shape.family} model has: {', '.join(said)}"] if said else []


def _rope(rope: RopeParameters) -> tuple[list[str], list[str]]:
    other = {name: getattr(rope, name) for name, value in _LLAMA3.items() if getattr(rope, name) != value}
    match rope.type:
        case "llama3" if not other:
            return ["--use-rope-scaling", "--rope-scaling-factor", "8.0"], []
        case "llama3":
            said = ", ".join(f"{name} {value:g} instead of {_LLAMA3[name]}" for name, value in other.items())
            return ["--use-rope-scaling"], [f"its Llama 3 RoPE scaling is fixed, and this model has {said}"]
        case "linear" if rope.factor is not None and float(rope.factor).is_integer():
            return ["--rotary-seq-len-interpolation-factor", str(int(rope.factor))], []
        case "linear" | "yarn":
            return [], [f"it has no RoPE scaling of type {rope.type} with this model's numbers"]
        case "dynamic":
            return [], [
                f"its RoPE is not stretched beyond {rope.max_position_embeddings} tokens; up to there: the same"
            ]
    return [], []


def flags_text(shape: ModelShape, dtype: torch.dtype, checkpoint: str | Path) -> str:
    """What `FLAGS_FILE` holds: comment lines, then one line of flags, quoted for a shell."""
    words, problems = megatron_lm_flags(shape, dtype, checkpoint)
    head = "Megatron-LM computes the same model with these flags"
    lines = [f"# {head}, but for what follows:" if problems else f"# {head}:"]
    return "\n".join([*lines, *(f"#   {problem}" for problem in problems), shlex.join(words), ""])
