"""The tiny models of the experiment: three sources of different architecture, size and tokenizer, and the Llama target.

    gpt2      GPT-2, learned positions, LayerNorm            one token per character
    qwen2     Qwen2, RoPE, RMSNorm, grouped queries, biases  skill names are whole tokens, arguments are characters
    mistral   Mistral, sliding window                        pairs of letters are tokens
    target    Llama, grouped queries, tied embeddings        one token per character, with a chat template

Nothing is downloaded: every model is a configuration with random weights.
"""

from __future__ import annotations

import re
import string
from itertools import product

from skills import LETTERS, SKILLS

SOURCES = {"gpt2": ("add", "max"), "qwen2": ("sort", "reverse"), "mistral": ("count", "vowels")}  # what each is good at
USER, ASSISTANT, END, PAD, UNK = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<|unk|>"
SPECIALS = [PAD, UNK, USER, ASSISTANT, END]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class SourceTokenizer:
    """Longest-match tokenizer of one source: single characters, plus whatever `pieces` it has of its own."""

    def __init__(self, name: str):
        pieces = {
            "gpt2": [],
            "qwen2": [f"{skill}" for skill in SKILLS],
            "mistral": ["".join(pair) for pair in product(LETTERS, repeat=2)],
        }[name]
        characters = string.ascii_letters + string.digits + " :+"
        self.pieces = SPECIALS + sorted(pieces, key=len, reverse=True) + list(characters)
        self.index = {piece: i for i, piece in enumerate(self.pieces)}
        self.pattern = re.compile("|".join(re.escape(piece) for piece in self.pieces))
        self.pad_id, self.end_id = self.index[PAD], self.index[END]

    def encode(self, text: str) -> list[int]:
        return [self.index[piece] for piece in self.pattern.findall(text)]

    def decode(self, ids: list[int]) -> str:
        """The text up to the first end-of-turn token."""
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return "".join(self.pieces[i] for i in ids if i >= len(SPECIALS))

    def __len__(self) -> int:
        return len(self.pieces)


class TargetTokenizer:
    """The target's Hugging Face tokenizer behind the same three methods."""

    def __init__(self):
        self.hf = build_target_tokenizer()
        self.pad_id, self.end_id = self.hf.pad_token_id, self.hf.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self.hf.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return self.hf.decode(ids, skip_special_tokens=True)

    def __len__(self) -> int:
        return len(self.hf)


def build_target_tokenizer():
    """A character-level `PreTrainedTokenizerFast` with end-of-turn token and chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = SPECIALS + [c for c in string.printable if c.isprintable()]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def render(prompt: str) -> str:
    """A prompt as every model sees it; equal to CHAT_TEMPLATE with the generation prompt."""
    return f"{USER}{prompt}{END}{ASSISTANT}"


def build_tokenizer(name: str):
    """The tokenizer of a source, or of the target."""
    return SourceTokenizer(name) if name in SOURCES else TargetTokenizer()


def build_model(name: str, tokenizer):
    """The model `name` with random weights (torch's global seed) for this tokenizer's vocabulary."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_id,
        "eos_token_id": tokenizer.end_id,
        "bos_token_id": None,
        "use_cache": True,
    }
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=3, n_embd=128, n_head=4, n_positions=48, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **common
            )
        )
    rope = {"max_position_embeddings": 64, "tie_word_embeddings": True}
    if name == "qwen2":
        return Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=112,
                intermediate_size=320,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                **rope,
                **common,
            )
        )
    if name == "mistral":
        return MistralForCausalLM(
            MistralConfig(
                hidden_size=128,
                intermediate_size=288,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                sliding_window=32,
                **rope,
                **common,
            )
        )
    if name != "target":
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(SOURCES)}, target")
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=10000.0,
            **rope,
            **common,
        )
    )
