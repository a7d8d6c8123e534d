"""Formats that people have their data in, each as a way to read one row as records.

A row is a JSON object, or a row of parquet, Arrow or CSV; a record is {"prompt", "source", "response", "reward"} and
the optional fields of docs/data_format.md. Which format a file has is read off its first row (format_reader.py).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fuserl_megatron.records.messages import shown

Row = dict[str, Any]

SOURCE_NAMES = ("source", "model", "model_name", "generator")
REWARD_NAMES = ("reward", "score", "overall_score", "rating")
"""Names that a response's source and its score have in public data sets, the first one found is taken."""
ALIASES = {"source": SOURCE_NAMES, "reward": REWARD_NAMES}
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Misfit(ValueError):
    """A row that is not of this format; the message says what is missing."""


@dataclass(frozen=True)
class Format:
    """One format: `records` reads a row; the fields `needs` tell it from the others."""

    name: str
    needs: tuple[str, ...]
    records: Callable[[Row], Iterator[Row]]
    looks: str
    """What a row looks like, for messages and the documentation."""


def _own(row: Row) -> Iterator[Row]:
    """Ours; source and reward may have another usual name."""
    if any(row.get(name) is None for name in ALIASES):
        row = row | {name: value for name, value in _scored(row).items() if row.get(name) is None}
    yield row


def _messages(row: Row) -> Iterator[Row]:
    yield _turn(row, _conversation(row["messages"], "messages"))


def _sharegpt(row: Row) -> Iterator[Row]:
    turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for number, turn in enumerate(_list(row["conversations"], "conversations")):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise Misfit(f"conversations[{number}] has no 'from' and 'value'")
        if turn["from"] not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise Misfit(f"conversations[{number}] is from {shown(turn['from'])}: known are {known}")
        turns.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    yield _turn(row, turns)


def _alpaca(row: Row) -> Iterator[Row]:
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n" + _text(row["input"], "input")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in _list(row.get("history") or [], "history"):
        if not isinstance(turn, list) or len(turn) != 2:
            raise Misfit("history is no list of [question, answer]")
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
    yield _scored(row) | {"prompt": [*messages, {"role": "user", "content": question}], "response": row["output"]}


def _completion(row: Row) -> Iterator[Row]:
    yield _scored(row) | {"prompt": row["prompt"], "response": _answer(row["completion"], "completion")}


def _preference(row: Row) -> Iterator[Row]:
    """TRL's pairs with an explicit or an implicit prompt, UltraFeedback-binarised with its scores."""
    for side, default in (("chosen", 1.0), ("rejected", 0.0)):
        value, prompt = row[side], row.get("prompt")
        if isinstance(value, list):
            conversation = _conversation(value, side)
            response = conversation[-1]["content"]
            # the whole conversation stands in both sides where more than the answer is there
            prompt = conversation[:-1] or prompt
        else:
            response = value
        if prompt is None:
            raise Misfit(f"{side} is text, and there is no 'prompt'")
        found = _first(row, (f"score_{side}", f"{side}_score", f"{side}_rating", f"{side}_reward"))
        model = _first(row, (f"{side}_model", f"{side}-model", f"model_{side}"))
        scored = {"reward": default if found is None else found}
        yield (_scored(row) | scored | ({"source": model} if model is not None else {})) | {
            "prompt": prompt,
            "response": response,
        }


def _ranked(row: Row) -> Iterator[Row]:
    """NeMo-RL's: completions by rank, 0 is the best; the reward is minus the rank."""
    context = row["context"]
    for number, item in enumerate(_list(row["completions"], "completions")):
        where = f"completions[{number}]"
        if not isinstance(item, dict) or "rank" not in item or "completion" not in item:
            raise Misfit(f"{where} has no 'rank' and 'completion'")
        if isinstance(item["rank"], bool) or not isinstance(item["rank"], int | float):
            raise Misfit(f"{where} has the rank {shown(item['rank'])}, no number")
        yield _scored(row) | {
            "prompt": context,
            "response": _answer(item["completion"], where),
            "reward": -float(item["rank"]),
        }


def _ultrafeedback(row: Row) -> Iterator[Row]:
    """UltraFeedback's own: several models' completions of one instruction, each with its score."""
    yield from _several(row, row["instruction"], _list(row["completions"], "completions"), "completions")


def _responses(row: Row) -> Iterator[Row]:
    """A list of responses under a prompt: objects, or texts beside lists `rewards` and `sources`."""
    items = _list(row["responses"], "responses")
    if all(isinstance(item, str) for item in items):
        beside = {}
        for name, names in (("reward", ("rewards", "scores")), ("source", ("sources", "models"))):
            values = _first(row, names)
            if values is not None:
                if len(_list(values, names[0])) != len(items):
                    raise Misfit(f"{names[0]} has {len(values)} entries for {len(items)} responses")
                beside[name] = values
        items = [{"response": text} | {k: v[i] for k, v in beside.items()} for i, text in enumerate(items)]
    yield from _several(row, row["prompt"], items, "responses")


def _several(row: Row, prompt: Any, items: Sequence[Any], name: str) -> Iterator[Row]:
    for number, item in enumerate(items):
        text = _first(item, ("response", "text", "completion", "content")) if isinstance(item, dict) else None
        if text is None:
            raise Misfit(f"{name}[{number}] has no 'response'")
        yield _scored(row) | _scored(item) | {"prompt": prompt, "response": _answer(text, f"{name}[{number}]")}


_ALL = (
    Format("preference", ("chosen", "rejected"), _preference, '{"prompt", "chosen", "rejected"}, with scores or not'),
    Format("nemo_rl", ("context", "completions"), _ranked, '{"context", "completions": [{"rank", "completion"}]}'),
    Format(
        "ultrafeedback",
        ("instruction", "completions"),
        _ultrafeedback,
        '{"instruction", "completions": [{"model", "response", "overall_score"}]}',
    ),
    Format(
        "responses",
        ("prompt", "responses"),
        _responses,
        '{"prompt", "responses": [{"source", "response", "reward"}]}',
    ),
    Format("records", ("prompt", "response"), _own, '{"prompt", "source", "response", "reward"}'),
    Format("messages", ("messages",), _messages, '{"messages": [{"role", "content"}]}, the last one the answer'),
    Format("sharegpt", ("conversations",), _sharegpt, '{"conversations": [{"from", "value"}]}'),
    Format("alpaca", ("instruction", "output"), _alpaca, '{"instruction", "input", "output"}'),
    Format("prompt_completion", ("prompt", "completion"), _completion, '{"prompt", "completion"}'),
)
FORMATS = {found.name: found for found in _ALL}
"""In the order in which they are tried."""


def _turn(row: Row, conversation: Sequence[Row]) -> Row:
    """A conversation whose last message is the response."""
    if len(conversation) < 2 or conversation[-1].get("role") != "assistant":
        raise Misfit("the last message must be the assistant's, after at least one other")
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return _scored(row) | tools | {"prompt": list(conversation[:-1]), "response": conversation[-1].get("content")}


def _scored(row: Row) -> Row:
    """Source and reward, where the row has them under a usual name."""
    found = {name: _first(row, names) for name, names in ALIASES.items()}
    return {name: value for name, value in found.items() if value is not None}


def _first(row: Row, names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _answer(value: Any, where: str) -> Any:
    """A response: text, or a list of messages of which the assistant's is meant."""
    return _conversation(value, where)[-1].get("content") if isinstance(value, list) else value


def _conversation(value: Any, where: str) -> list[Row]:
    messages = _list(value, where)
    if not messages or not all(isinstance(message, dict) and "role" in message for message in messages):
        raise Misfit(f"{where} is no list of messages (role, content)")
    if messages[-1]["role"] != "assistant":
        raise Misfit(f"{where} does not end with the assistant's message")
    return messages


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise Misfit(f"{where} is {shown(value)}, not text")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, str) and value[:1] in "[{":  # a column of a CSV file
        try:
            value = json.loads(value)
        except ValueError:
            raise Misfit(f"{where} is text and no JSON") from None
    if not isinstance(value, list):
        raise Misfit(f"{where} is {shown(value)}, not a list")
    return value
