"""Do a data set and a model belong together? Same ids for the same text, and the same rendering of a conversation.

A data set holds token ids; under another tokenizer they are other words, and nothing in training would notice. `build`
writes into the manifest what any model's tokenizer can be compared with later, wherever the first one has gone:

    files          hash of the tokenizer's files: equal files need no further look (and no import of transformers)
    tokens         hash of what each id stands for, of all ids that occur in the data
    probes         hashes of the ids of fixed texts (languages, digits, code, white space, marks)
    conversations  hashes of prompt and scored tokens of fixed conversations, as the template renders them

Tokenizers match when every id of the data stands for the same token in both, both cut the probes alike, and the end of
a turn has the same id. What the data never use (reserved marks, added tokens, a longer vocabulary, other padding) makes
no difference, although it changes `ChatTokenizer.hash`. Of a data set of format 1 that hash is all there is.

Templates match when their text is equal, or when they render the conversations alike. A model that has none is taught
the data's, and so is a model under a data set that was built with `chat_template=FILE`: that is meant, it is said, and
the export carries the data's template. Any other difference is refused.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from fuserl_megatron.config.hub import TOKENIZER_FILES, local_model
from fuserl_megatron.config.schema import Config, UserError
from fuserl_megatron.data.dataset import FusedDataset, Manifest
from fuserl_megatron.data.tokenize import BadPrompt, ChatTokenizer

PLACE = ("probe", 1)
PROBES = {
    "english": "The quick brown foxes' jumping wasn't over; Dr. O'Neil said \"naïve\" at 5:30pm.",
    "languages": "Größe, œuvre, ¿cómo está?, Ελληνικά, русский язык, 你好世界, こんにちは, 안녕, हिन्दी, العربية, 👩‍🚀🚀",
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
        "tokens": _tokens_hash(tokenizer, dataset),
        "probes": {name: _digest(tokenizer.tokenizer(text)["input_ids"]) for name, text in PROBES.items()},
        "conversations": {name: _conversation(tokenizer, *case) for name, case in CONVERSATIONS.items()},
    }


def check_run(config: Config) -> list[str]:
    """Compare the data sets of a run with its model, its tokenizer and its reference, as far as they are here.

    Returns:
        Lines to say: what was not compared, and which template the exported model will carry.

    Raises:
        UserError: tokenizer or rendering differ, and run.disable_checks does not name tokenizer_match, template_match.
    """
    model = ("model.tokenizer", config.model.tokenizer) if config.model.tokenizer else ("model.path", config.model.path)
    said = []
    for path in filter(None, (config.data.path, config.data.validation_path)):
        said += compare(path, *model, config.run.disable_checks)
        reference = config.objective.reference
        if reference and reference != config.model.path and _has_tokenizer(reference):
            compare(path, "objective.reference", reference, (*config.run.disable_checks, "template_match"))
    return list(dict.fromkeys(said))


def compare(data_path: str, setting: str, model: str, disabled: tuple[str, ...] = ()) -> list[str]:
    """Compare one data set with the tokenizer in one directory; as `check_run`.

    Args:
        data_path: a fused data set.
        setting: the name of the setting that names the model, for messages.
        model: a directory or hub name; one without a tokenizer cannot be compared, which is said.
        disabled: of tokenizer_match and template_match, those that are not asked for.
    """
    if not _has_tokenizer(model):
        return [f"tokenizer  {model} holds none: not compared with {data_path}'s"]
    manifest = Manifest.read(data_path)
    if "tokenizer_match" not in disabled:
        problem = _tokenizer_problem(manifest, data_path, model)
        if problem is not None:
            raise UserError(
                f"data.path={data_path}: made with the tokenizer of {manifest.tokenizer}, and that of "
                f"{setting}={model} is another one: {problem}; build it with tokenizer={model}, or overrule: "
                "run.disable_checks=[tokenizer_match]."
            )
    own = own_template(model)
    if own == manifest.chat_template and manifest.identity is not None:
        return []
    if manifest.identity is None:
        if "template_match" in disabled or manifest.chat_template_hash == (own and _sha256(own)):
            return []
        raise UserError(
            f"data.path={data_path}: rendered with another chat template than that of {setting}={model}, and its "
            "format is of an earlier version, which does not keep the text; build it again, or overrule: "
            "run.disable_checks=[template_match]."
        )
    if own is None or manifest.chat_template_given:
        what = "has no chat template" if own is None else "has another chat template"
        return [f"template   {model} {what}; an exported model carries that of {data_path}"]
    if "template_match" in disabled or not (difference := _rendering_problem(manifest, model)):
        return []
    raise UserError(
        f"data.path={data_path}: rendered with another chat template than that of {setting}={model} ({difference}); "
        f"build it with tokenizer={model}, or with chat_template=FILE if the model is to learn another one, or overrule: "
        "run.disable_checks=[template_match]."
    )


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


def _has_tokenizer(model: str) -> bool:
    directory = Path(local_model(model, weights=False))
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def _opened(manifest: Manifest, model: str) -> ChatTokenizer:
    """The model's tokenizer under the data's template, where that is kept: the model's own may be one we refuse."""
    if manifest.chat_template is None:
        return ChatTokenizer(model)
    with tempfile.NamedTemporaryFile("w", suffix=".jinja", encoding="utf-8") as file:
        file.write(manifest.chat_template)
        file.flush()
        return ChatTokenizer(model, file.name, template_kwargs=manifest.template_kwargs or {})


def _tokenizer_problem(manifest: Manifest, data_path: str, model: str) -> str | None:
    """In which way the tokenizers differ, None where it makes no difference to the data."""
    known = manifest.identity
    if known is not None and known["files"] == files_hash(model):
        return None
    mine = _opened(manifest, model)
    if mine.hash == manifest.tokenizer_hash:
        return None
    if known is None:
        return "vocabulary, merges or special tokens differ (more is not known of a data set of format 1)"
    end = mine.tokenizer.convert_tokens_to_ids(manifest.end_of_turn)
    if end != manifest.end_of_turn_id:
        return f"{manifest.end_of_turn}, the end of turn, has the id {manifest.end_of_turn_id} there and {end} here"
    for name, text in PROBES.items():
        if known["probes"].get(name) not in (None, _digest(mine.tokenizer(text)["input_ids"])):
            return f"it gives other ids (probe text '{name}')"
    if known["tokens"] != _tokens_hash(mine, FusedDataset(data_path, verify=False)):
        return "ids of the data stand for other tokens"
    return None


def _rendering_problem(manifest: Manifest, model: str) -> str | None:
    try:
        mine = ChatTokenizer(model, template_kwargs=manifest.template_kwargs or {})
    except UserError as error:
        return str(error)
    for name, case in CONVERSATIONS.items():
        if manifest.identity["conversations"].get(name) not in (None, _conversation(mine, *case)):
            return f"a conversation of the kind '{name}' is rendered otherwise"
    return None


def _tokens_hash(tokenizer: ChatTokenizer, dataset: FusedDataset) -> str:
    ids = dataset.used_token_ids().tolist()
    inside = [i for i in ids if i < len(tokenizer.tokenizer)]  # a foreign data set may have larger ones
    return _digest([ids, tokenizer.tokenizer.convert_ids_to_tokens(inside)])


def _conversation(tokenizer: ChatTokenizer, messages: tuple[tuple[str, str], ...], response: str) -> str:
    try:
        prompt = tokenizer.encode_prompt(messages)
        (answer,) = tokenizer.encode_responses(prompt, [(response, PLACE)])
        return _digest([prompt.tokens, answer.tokens])
    except (BadPrompt, AttributeError):  # a template that refuses it, or the response as a bad record
        return "refused"


def _without_template(content: bytes) -> bytes:
    try:
        values = json.loads(content)
        values.pop("chat_template", None)
        return json.dumps(values, sort_keys=True).encode()
    except (ValueError, RecursionError, AttributeError):
        return content


def _digest(value: Any) -> str:
    return _sha256(json.dumps(value))[:16]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
