"""Small tokenizers made on the spot, and data sets built from them through the real `build`.

words       one token per word w0 .. w99, no chat template: lengths in tests are the number of words, plus the eos token
chatml      byte-level, ChatML template, pad == eos == <|im_end|>
llama3      byte-level, headers and <|eot_id|> as in Llama 3, content trimmed by the template
unmarked    byte-level, "Role: content" lines, a template that knows no generation prompt and ends turns with a newline
metaspace   a space in front of every text, as SentencePiece does, [INST] template
"""

import json
import logging

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from fuserl_megatron.config.schema import BuildConfig, ObjectiveConfig
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.pairs import prepare
from fuserl_megatron.records.build import build

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
UNMARKED = "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
METASPACE = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


def _save(path, backend, specials, template, **names):
    from transformers import PreTrainedTokenizerFast

    logging.getLogger("transformers").setLevel(logging.ERROR)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if template:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return str(path)


def _bytes():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ċ", "Ċ"), ("h", "e"), ("l", "l")]
    vocab = {t: i for i, t in enumerate(alphabet + [a + b for a, b in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # newlines stay together and apart from the word after them, as in Llama 3's vocabulary
    words = pre_tokenizers.Split(Regex(r"\s*\n+| ?[^\s]+|\s+(?!\S)|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers_dir(tmp_path_factory):
    """Name -> directory."""
    root = tmp_path_factory.mktemp("tokenizers")
    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "</s>": 1, **{f"w{i}": i + 2 for i in range(100)}}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = ["<unk>", "\u2581", *(c for c in "abcdefghijklmnopqrstuvwxyz[]/INST.")]
    meta = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    meta.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    meta.decoder = decoders.Metaspace(prepend_scheme="first")
    llama3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return {
        "words": _save(root / "words", words, ["</s>"], None, eos_token="</s>", unk_token="<unk>"),
        "chatml": _save(
            root / "chatml",
            _bytes(),
            ["<|im_start|>", "<|im_end|>"],
            CHATML,
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
        ),
        "llama3": _save(
            root / "llama3", _bytes(), llama3, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
        ),
        "unmarked": _save(root / "unmarked", _bytes(), ["</s>"], UNMARKED, eos_token="</s>"),
        "metaspace": _save(
            root / "metaspace", meta, ["<s>", "</s>"], METASPACE, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ),
    }


@pytest.fixture
def write_records(tmp_path):
    """write_records(records, name) -> path of a JSONL file; a record is a dict or a raw line."""

    def write(records, name="in.jsonl"):
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def build_dataset(tmp_path, tokenizers_dir, write_records):
    """build_dataset(records, **BuildConfig fields) -> FusedDataset (words tokenizer, temperature 0.1 unless said)."""

    def run(records, **settings):
        values = {
            "inputs": (write_records(records),),
            "output": str(tmp_path / "fused"),
            "tokenizer": tokenizers_dir["words"],
            "reward_temperature": 0.1,
            **settings,
        }
        build(BuildConfig(**values), progress=False)
        return FusedDataset(values["output"])

    return run


@pytest.fixture
def prepare_stage():
    """prepare_stage(dataset, stage, temperature, **ObjectiveConfig fields) -> PreparedSet."""

    def run(dataset, stage="fusesft", temperature=None, **settings):
        loss = {"loss": "dpo"} if stage == "fusepo" else {}
        return prepare(dataset, ObjectiveConfig(stage=stage, **{**loss, **settings}), temperature)

    return run


def record(prompt="w1 w2", source="a", response="w3", reward=0.5, **more):
    return {"prompt": prompt, "source": source, "response": response, "reward": reward, **more}


@pytest.fixture(scope="session")
def make_record():
    return record
