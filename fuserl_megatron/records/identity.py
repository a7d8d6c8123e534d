"""What of a data set's tokenizer and template a model's can be compared with later, wherever the first one has gone.

`build` writes into the manifest, under `identity`:

    files          hash of the tokenizer's files: equal files need no further look (and no import of transformers)
    tokens         hash of what each id stands for, of all ids that occur in the data
    probes         hashes of the ids of fixed texts (languages, digits, code, white space, marks)
    conversations  hashes of prompt and scored tokens of fixed conversations, as the template renders them

belonging.py compares.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.records.messages import BadRecord
from fuserl_megatron.records.tokenize import BadPrompt, ChatTokenizer
from fuserl_megatron.util.hub import TOKENIZER_FILES, local_model

PLACE = ("probe", 1)
PROBES = {
    "english": "The quick brown foxes' jumping wasn't over; Dr. O'Neil said \"naïve\" at 5:30pm.",
    "languages": "Größe, œuvre, ¿cómo está?, Ελληνικά, русский язык, 你好世界, こんにちは, 안녕, हिन्दी, العربية, 🚀",
    "numbers": "3.14159 + 2,718,281 = 1e-05; 0x7fff; 2026-11-29; 1234567890; ½ ² ∑ √ ≤",
    "code": "def f(x: int) -> str:\n    return f'{x!r}'  # ok\n\n\tif (a != b && c[0]) { i += 1; }\n",
    "white space": "  two  spaces,\ttabs\t\t, three\n\n\nlines \r\n and trailing   ",
    "marks": "<|im_start|>user <s>[INST] </s> <think> <tool_call> <|eot_id|> <start_of_turn> <unk> <pad>",
    "words": "internationalisation hyperparameters antidisestablishmentarianism supercalifragilistic Zürich kubectl",
}
CONVERSATIONS = {
    "one turn": ((("user", "What is 2 + 2?"),), "It is 4."),
    "system": ((("system", "Be brief."), ("user", "What is 2 + 2?")), "4."),
    "three turns": ((("user", "Hello."), ("assistant", "Hi!"), ("user", "Bye?")), "Bye."),
}


def identity_of(tokenizer: ChatTokenizer, path: str, dataset: FusedDataset) -> dict[str, Any]:
    """What the manifest keeps of a data set's tokenizer, a directory or hub name."""
    return {
        "files": files_hash(path),
        "tokens": tokens_hash(tokenizer, dataset),
        "probes": {name: digest(tokenizer.tokenizer(text)["input_ids"]) for name, text in PROBES.items()},
        "conversations": {name: conversation_hash(tokenizer, *case) for name, case in CONVERSATIONS.items()},
    }


def own_template(model: str) -> str | None:
    """The text of a directory's chat template, as transformers finds it: a file of its own, or the tokenizer's config;
    of several the one called default."""
    directory = Path(local_model(model, weights=False))
    try:
        if (directory / "chat_template.jinja").is_file():
            return (directory / "chat_template.jinja").read_text(encoding="utf-8")
        found = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, OSError):
        return None  # opening the tokenizer says what is wrong with it
    return found or None


def files_hash(model: str) -> str:
    """Hash of the files that a tokenizer is read from, chat templates left out."""
    directory, digest = Path(local_model(model, weights=False)), hashlib.sha256()
    names = (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
    for name in names:
        if (directory / name).is_file():
            content = (directory / name).read_bytes()
            if name == "tokenizer_config.json":
                content = _without_template(content)
            digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def has_tokenizer(model: str) -> bool:
    """Whether a directory or hub name holds a tokenizer."""
    directory = Path(local_model(model, weights=False))
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def tokens_hash(tokenizer: ChatTokenizer, dataset: FusedDataset) -> str:
    """Hash of the ids that occur in the data and what each stands for."""
    ids = dataset.used_token_ids().tolist()
    inside = [i for i in ids if i < len(tokenizer.tokenizer)]  # a foreign data set may have larger ones
    return digest([ids, tokenizer.tokenizer.convert_ids_to_tokens(inside)])


def conversation_hash(tokenizer: ChatTokenizer, messages: tuple[tuple[str, str], ...], response: str) -> str:
    """Hash of the prompt's and the scored tokens; "refused" where the template does not take it."""
    try:
        prompt = tokenizer.encode_prompt(messages)
        (answer,) = tokenizer.encode_responses(prompt, [(response, PLACE)])
    except BadPrompt:
        return "refused"
    return "refused" if isinstance(answer, BadRecord) else digest([prompt.tokens, answer.tokens])


def _without_template(content: bytes) -> bytes:
    try:
        values = json.loads(content)
        values.pop("chat_template", None)
        return json.dumps(values, sort_keys=True).encode()
    except (ValueError, RecursionError, AttributeError):
        return content


def digest(value: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return sha256(json.dumps(value))[:16]


def sha256(text: str) -> str:
    """Hex sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
