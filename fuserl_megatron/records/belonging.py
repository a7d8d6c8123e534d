"""Do a data set and a model belong together? Same ids for the same text, and the same rendering of a conversation.

A data set holds token ids; under another tokenizer they are other words, and nothing in training would notice.

Tokenizers match when every id of the data stands for the same token in both, both cut the probe texts alike, and the
end of a turn has the same id. What the data never use (reserved marks, added tokens, a longer vocabulary, padding)
makes no difference, although it changes `ChatTokenizer.hash`. Of a data set of format 1 that hash is all there is.

Templates match when their text is equal, or when they render the fixed conversations alike. A model that has none is
taught the data's, and so is a model under a data set that was built with `chat_template=FILE`: that is meant, it is
said, and the export carries the data's template. Any other difference is refused.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from fuserl_megatron.config.load import from_dict
from fuserl_megatron.config.schema import Config
from fuserl_megatron.data.dataset import FusedDataset, Manifest
from fuserl_megatron.records.identity import (
    CONVERSATIONS,
    PROBES,
    conversation_hash,
    digest,
    files_hash,
    has_tokenizer,
    own_template,
    sha256,
    tokens_hash,
)
from fuserl_megatron.records.tokenize import ChatTokenizer
from fuserl_megatron.util.errors import UserError


class Stage(Protocol):
    """What is asked of a stage of `fuserl launch`."""

    @property
    def name(self) -> str:
        """As in the list of stages."""

    @property
    def trains(self) -> bool:
        """Whether its settings are those of a training run."""

    @property
    def config(self) -> str:
        """Its frozen settings as yaml."""

    @property
    def more_config(self) -> Mapping[str, str]:
        """Further frozen files beside it, path -> yaml: of sources or rewards."""

    @property
    def results_dir(self) -> str:
        """Where it writes."""


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
        if reference and reference != config.model.path and has_tokenizer(reference):
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
    if not has_tokenizer(model):
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
        if "template_match" in disabled or manifest.chat_template_hash == (own and sha256(own)):
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
        f"build it with tokenizer={model}, or with chat_template=FILE if the model is to learn another one, or "
        "overrule: run.disable_checks=[template_match]."
    )


def check_chain(stages: Iterable[Stage], target: str) -> None:
    """`fuserl launch`, before anything is submitted: as `check_run`, as far as data sets and models are here already.

    A data set that is yet to be built is compared by the tokenizer it is to be built with, a model that an earlier
    stage writes by the target's.
    """
    import yaml

    configs = {stage.name: yaml.safe_load(stage.config) for stage in stages if stage.config}
    built = {stage.results_dir: stage.name for stage in stages if stage.name.startswith("build_")}
    for stage in (stage for stage in stages if stage.trains):
        config = from_dict(Config, configs[stage.name])
        model = config.model.tokenizer or config.model.path
        model = model if os.path.exists(model) else target
        try:
            for path in filter(None, (config.data.path, config.data.validation_path)):
                if (build := built.get(str(Path(path).resolve()))) is not None:
                    if "tokenizer_match" not in config.run.disable_checks:
                        check_tokenizers(f"{build}.tokenizer", configs[build]["tokenizer"], model)
                elif (Path(path) / "manifest.json").is_file():
                    compare(path, "model.path", model, config.run.disable_checks)
        except UserError as error:
            raise UserError(f"{stage.name}: {error}") from None


def check_tokenizers(setting: str, built_with: str, model: str) -> None:
    """Compare two tokenizer directories, for a data set that is yet to be built.

    Raises:
        UserError: they give other ids for the probe texts. A directory without a tokenizer is not compared.
    """
    if not (has_tokenizer(built_with) and has_tokenizer(model)) or files_hash(built_with) == files_hash(model):
        return
    theirs, mine = ChatTokenizer(built_with).tokenizer, ChatTokenizer(model).tokenizer
    for name, text in PROBES.items():
        if theirs(text)["input_ids"] != mine(text)["input_ids"]:
            raise UserError(
                f"{setting}={built_with}: is another tokenizer than that of {model}, which is to be trained: it gives "
                f"other ids (probe text '{name}'); leave {setting} out, or overrule: "
                "train.run.disable_checks=[tokenizer_match]."
            )


def _opened(manifest: Manifest, model: str) -> ChatTokenizer:
    """The model's tokenizer under the data's template, where that is kept: the model's own may be one we refuse."""
    if manifest.chat_template is None:
        return ChatTokenizer(model)
    with tempfile.NamedTemporaryFile("w", suffix=".jinja", encoding="utf-8") as file:
        file.write(manifest.chat_template)
        file.flush()
        return ChatTokenizer(model, file.name, chat_template_kwargs=manifest.template_kwargs or {})


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
        here = "is no token here" if end is None else f"{end} here"
        return f"{manifest.end_of_turn}, the end of turn, has the id {manifest.end_of_turn_id} there and {here}"
    for name, text in PROBES.items():
        if known["probes"].get(name) not in (None, digest(mine.tokenizer(text)["input_ids"])):
            return f"it gives other ids (probe text '{name}')"
    if known["tokens"] != tokens_hash(mine, FusedDataset(data_path, verify=False)):
        return "ids of the data stand for other tokens"
    return None


def _rendering_problem(manifest: Manifest, model: str) -> str | None:
    try:
        mine = ChatTokenizer(model, chat_template_kwargs=manifest.template_kwargs or {})
    except UserError as error:
        return str(error)
    told = (manifest.identity or {})["conversations"]
    for name, case in CONVERSATIONS.items():
        if told.get(name) not in (None, conversation_hash(mine, *case)):
            return f"a conversation of the kind '{name}' is rendered otherwise"
    return None
