"""A reward model in this process: prompt and answer in, one number out, whatever else is in the batch.

transformers' own sequence classification looks for the last token that is not the padding token, by its id. Where
padding is the end-of-turn token, as in many models, it takes the end of the answer for padding and reads one token too
early: no error, other rewards. Here a batch is padded on the right by us, and the hidden state is taken at the position
of the last true token. B rows of a batch, S tokens, H hidden size.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuserl_megatron.config.score_sections import ModelReward
from fuserl_megatron.making.answers import Answer
from fuserl_megatron.making.conversation import Conversation, Unscorable
from fuserl_megatron.records.messages import Messages
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.hub import local_model
from fuserl_megatron.util.paths import did_you_mean
from fuserl_megatron.util.text import first_line

WINDOW = 4096
"""Rows that are sorted by length together: a batch then holds rows of about one length."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RewardModel:
    """One model, loaded. `head` (armorm.py has the other one) turns hidden states into numbers."""

    def __init__(self, name: str, reward: ModelReward):
        """Load tokenizer, template, model.

        Raises:
            UserError: no such model, no reward model, more than one label, weights that are missing or not finite.
        """
        self.name, self.reward, self.where = name, reward, f"rewards.{name}"
        self.directory = local_model(reward.model)
        self.device = _device(self.where, reward.device)
        dtype = reward.dtype if reward.dtype != "auto" else ("float32" if self.device == "cpu" else "bfloat16")
        self.dtype = dtype
        config = load_config(self.where, self.directory)
        self.conversation = Conversation(self.where, self.directory, reward.chat_template)
        load: Callable[..., tuple[torch.nn.Module, Any]] = load_classifier
        if reward.head == "armorm":
            from fuserl_megatron.making.armorm import load_armorm as load
        self.body, self.head = load(self.where, self.directory, config, DTYPES[dtype], self.conversation)
        self.body, self.head = self.body.to(self.device).eval(), self.head.to(self.device).eval()
        self.max_length = (
            reward.max_length or getattr(config.get_text_config(), "max_position_embeddings", None) or 2**30
        )
        self.weights = weights_identity(self.directory)

    def __enter__(self) -> "RewardModel":
        return self

    def __exit__(self, *_error: object) -> None:
        del self.body, self.head
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def settings(self) -> dict[str, Any]:
        """What changes a value: the weights, the template, the number format, the longest row."""
        about = {"weights": self.weights, "head": self.reward.head, "template_sha256": self.conversation.template_hash}
        return {**about, "dtype": self.dtype, "max_length": self.max_length}

    def notes(self) -> dict[str, Any]:
        """Where the model is from."""
        import transformers

        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        return {"model": self.reward.model, "directory": self.directory, "device": self.device, **versions}

    def warnings(self) -> list[str]:
        """What is unusual about the tokens."""
        if not self.conversation.bos_left_out:
            return []
        return [f"reward {self.name}: its chat template prints no BOS, which its tokenizer would put before plain text"]

    def outcomes(self, samples: Iterable[tuple[int, Answer]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Score samples, each under a position; outcomes come batch by batch."""
        window: list[tuple[int, list[int]]] = []
        for position, sample in samples:
            try:
                window.append((position, self.tokens(sample.messages, sample.response, sample.tools)))
            except Unscorable as error:
                yield position, {"error": str(error)}
            if len(window) == WINDOW:
                yield from self._window(window)
                window = []
        yield from self._window(window)

    def tokens(self, messages: Messages, response: str, tools: str = "") -> list[int]:
        """The row as the model sees it.

        Raises:
            Unscorable: too long, empty, or refused by the template.
        """
        ids = self.conversation.ids(self.conversation.text(messages, response, tools))
        if not 0 < len(ids) <= self.max_length:
            raise Unscorable(f"too long: {len(ids)} tokens, at most {self.max_length}" if ids else "no tokens")
        return ids

    @torch.inference_mode()
    def score(self, rows_BS: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """Values of one batch of token rows of any lengths.

        Raises:
            UserError: the model gives a number that is not finite.
        """
        longest = max(map(len, rows_BS))
        tokens_BS = torch.zeros(
            len(rows_BS), longest, dtype=torch.long
        )  # what stands in the padding is never looked at
        mask_BS = torch.zeros_like(tokens_BS)
        for i, row in enumerate(rows_BS):
            tokens_BS[i, : len(row)], mask_BS[i, : len(row)] = torch.tensor(row), 1
        hidden_BSH = hidden_states(self.body, tokens_BS.to(self.device), mask_BS.to(self.device))
        found = self.head.outcomes(hidden_BSH, last_positions(mask_BS.to(self.device)), rows_BS)
        for outcome in found:
            if not math.isfinite(outcome.get("value", 0.0)):
                hint = "" if self.dtype != "float16" else "; float16 overflows in many models, bfloat16 does not"
                raise UserError(f"{self.where}: {self.reward.model} gives {outcome['value']}{hint}")
        return found

    def _window(self, window: list[tuple[int, list[int]]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Longest rows first: what does not fit the memory fails in the first batch, not in the last."""
        window.sort(key=lambda entry: -len(entry[1]))
        while window:
            size = max(1, self.reward.batch_tokens // len(window[0][1]))
            batch, window = window[:size], window[size:]
            try:
                found = self.score([ids for _, ids in batch])
            except torch.OutOfMemoryError:
                tokens = f"{self.reward.batch_tokens} tokens a batch"
                raise UserError(
                    f"{self.where}: out of GPU memory with {tokens}; halve {self.where}.batch_tokens"
                ) from None
            yield from zip((position for position, _ in batch), found, strict=True)


class LinearHead(torch.nn.Module):
    """The classifier's own linear layer, in fp32, on the hidden state of each row's last token."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__()
        self.layer = layer.float()

    def outcomes(self, hidden_BSH: Tensor, last_B: Tensor, rows_BS: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """{"value"} of each row."""
        rows_B = torch.arange(len(last_B), device=last_B.device)
        return [{"value": value} for value in self.layer(hidden_BSH[rows_B, last_B].float())[:, 0].tolist()]


class WholeModel(torch.nn.Module):
    """Encoders (BERT and its kin) pool by their own layers from the first token: their logits are taken as they are."""

    def outcomes(self, logits_B1: Tensor, last_B: Tensor, rows_BS: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """{"value"} of each row."""
        return [{"value": value} for value in logits_B1.float()[:, 0].tolist()]


def last_positions(mask_BS: Tensor) -> Tensor:
    """[B] position of each row's last true token, for padding on either side."""
    positions_S = torch.arange(1, mask_BS.shape[1] + 1, device=mask_BS.device)
    return (positions_S * mask_BS).argmax(dim=1)


def hidden_states(body: torch.nn.Module, tokens_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """[B, S, H] of the last layer, or the logits of an encoder; positions count true tokens, whatever the padding."""
    inputs: dict[str, Any] = {"input_ids": tokens_BS, "attention_mask": mask_BS}
    if hasattr(body, "pools_itself"):
        return body(**inputs).logits
    positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    return body(**inputs, position_ids=positions_BS, use_cache=False).last_hidden_state


def load_config(where: str, directory: str) -> Any:
    """The model's config.

    Raises:
        UserError: there is none that this transformers can read.
    """
    from transformers import AutoConfig, LlamaConfig, PretrainedConfig

    if not Path(directory).is_dir():  # transformers would ask the hub for it, for half a minute
        raise UserError(f"{where}.model={directory}: no such directory{did_you_mean(directory)}")
    try:
        values, _ = PretrainedConfig.get_config_dict(directory)
        if values.get("model_type") == "llama":  # ArmoRM names code of its own here, which is not run
            return LlamaConfig.from_dict(values)
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{where}.model={directory}: no readable model there ({first_line(error)})") from None


def load_classifier(
    where: str, directory: str, config: Any, dtype: torch.dtype, _conversation: Conversation
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Body and head of a sequence classification model with one label.

    Raises:
        UserError: another kind of model, several labels, weights that are missing.
    """
    from transformers import AutoModelForSequenceClassification

    if "LlamaForRewardModelWithGating" in (config.architectures or []):
        raise UserError(f"{where}.head=score: {directory} is an ArmoRM; set {where}.head=armorm")
    if config.num_labels != 1:
        raise UserError(f"{where}: {directory} has {config.num_labels} labels; a reward model has one")
    try:
        with quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                directory, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:
        raise UserError(f"{where}.model={directory}: cannot be loaded ({first_line(error)})") from None
    refuse_missing(where, directory, info["missing_keys"])
    refuse_not_finite(where, directory, model)
    if isinstance(layer := getattr(model, "score", None), torch.nn.Linear):
        return getattr(model, model.base_model_prefix), LinearHead(layer)
    model.pools_itself = True
    return model, WholeModel()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers prints a table of missing and surplus weights; what matters of it we say in one line."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def refuse_missing(where: str, directory: str, missing: Iterable[str]) -> None:
    """Transformers fills what is missing with random numbers, and such a head gives random rewards.

    Raises:
        UserError: names the first missing weight.
    """
    if lost := sorted(missing):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(f"{where}: {directory} lacks {lost[0]}{more}: no reward model, or an incomplete copy of one")


def refuse_not_finite(where: str, directory: str, model: torch.nn.Module) -> None:
    """One NaN among the weights makes every reward NaN, or worse, some.

    Raises:
        UserError: names the first such weight.
    """
    for name, weights in model.state_dict().items():
        if not bool(torch.isfinite(weights).all()):
            raise UserError(f"{where}: {directory} has NaN or infinity in {name}; copy the model again")


def weights_identity(directory: str) -> str:
    """What tells one version of a model from another: a hub copy's commit, else a hash of names, sizes and both ends of
    the files (a model that was trained on differs everywhere; 16 GB need not be read twice)."""
    path = Path(directory)
    if path.parent.name == "snapshots":
        return f"revision {path.name}"
    digest = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.bin"), path / "config.json"]):
        with open(file, "rb") as content:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode() + content.read(2**20))
            content.seek(max(0, size - 2**20))
            digest.update(content.read(2**20))
    return f"sha256 {digest.hexdigest()[:32]}"


def _device(where: str, wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{where}.device=cuda: torch sees no GPU here; device=cpu, or an endpoint reward")
    return wanted if wanted != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
