"""Prompts of a data set as the model sees them, with what is scored marked, weights, rewards and pairs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from fuserl_megatron.config.schema import ObjectiveConfig
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.pairs import prepare
from fuserl_megatron.data.prepared import PreparedSet
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import printable


@dataclass(frozen=True)
class ShownResponse:
    """One response of a prompt."""

    source: str
    reward: float
    place: str
    text: str
    """The scored tokens as text, special tokens included."""
    num_tokens: int
    sft_weight: float
    """Its weight in FuseSFT, 0 where it is not the best of its source."""
    side: str
    """chosen, rejected or nothing: its part in FusePO's pairs."""
    pair_weight: float


@dataclass(frozen=True)
class ShownPrompt:
    """One prompt."""

    number: int
    place: str
    text: str
    num_tokens: int
    responses: tuple[ShownResponse, ...]


def shown_prompts(dataset: FusedDataset, tokenizer: Any, numbers: list[int]) -> Iterator[ShownPrompt]:
    """The prompts of these numbers, from 0.

    Args:
        dataset: the data set.
        tokenizer: has `decode` of a list of ids; the one the data set was made with.
        numbers: which prompts.

    Raises:
        UserError: there is no such prompt.
    """
    for number in numbers:
        if not 0 <= number < dataset.num_groups:
            raise UserError(f"prompt {number}: the data set has prompts 0 to {dataset.num_groups - 1}.")
    sft = prepare(dataset, ObjectiveConfig())
    try:
        pairs = prepare(dataset, ObjectiveConfig(stage="fusepo", loss="ln_dpo"))
    except UserError:  # no prompt has two responses of one source that differ
        pairs = None
    decode: Callable[[np.ndarray], str] = lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False)  # noqa: E731
    for number in numbers:
        weights = _weights(sft, number)
        sides = {} if pairs is None else _sides(pairs, number)
        found = []
        for i in range(int(dataset.response_offsets[number]), int(dataset.response_offsets[number + 1])):
            side, pair_weight = sides.get(i, ("", 0.0))
            ids = dataset.response(number, i)
            source, reward = dataset.sources[dataset.source_ids[i]], float(dataset.rewards[i])
            place, weight = dataset.place(i), weights.get(i, 0.0)
            found.append(ShownResponse(source, reward, place, decode(ids), len(ids), weight, side, pair_weight))
        ids = dataset.prompt(number)
        yield ShownPrompt(number, dataset.prompt_place(number), decode(ids), len(ids), tuple(found))


def _row(prepared: PreparedSet, number: int) -> int | None:
    found = np.flatnonzero(prepared.group_ids == number)
    return int(found[0]) if found.size else None


def _weights(prepared: PreparedSet, number: int) -> dict[int, float]:
    row = _row(prepared, number)
    if row is None:
        return {}
    part = slice(prepared.sequence_offsets[row], prepared.sequence_offsets[row + 1])
    return dict(zip(prepared.response_ids[part].tolist(), prepared.weights[part].tolist(), strict=True))


def _sides(prepared: PreparedSet, number: int) -> dict[int, tuple[str, float]]:
    row = _row(prepared, number)
    if row is None:
        return {}
    first, part = prepared.sequence_offsets[row], slice(prepared.pair_offsets[row], prepared.pair_offsets[row + 1])
    found = {}
    for side, index in (("chosen", prepared.chosen), ("rejected", prepared.rejected)):
        for place, weight in zip(index[part], prepared.pair_weights[part], strict=True):
            found[int(prepared.response_ids[first + place])] = (side, float(weight))
    return found


def as_text(prompt: ShownPrompt, colour: bool) -> str:
    """For a terminal; what is scored is green, or stands between ⟦ and ⟧ where there are no colours."""
    begin, end, dim, usual = ("\033[32m", "\033[0m", "\033[2m", "\033[0m") if colour else ("⟦", "⟧", "", "")
    lines = [f"{dim}prompt {prompt.number} ({printable(prompt.place)}), {prompt.num_tokens} tokens{usual}"]
    lines.append(printable(prompt.text, keep="\n\t"))
    for r in prompt.responses:
        lines.append(f"{dim}-- {printable(r.source)}: {facts(r)} ({printable(r.place)}){usual}")
        lines.append(f"{begin}{printable(r.text, keep=chr(10) + chr(9))}{end}")
    return "\n".join(lines)


def facts(response: ShownResponse) -> str:
    """Reward, weights and side, in words."""
    parts = [f"reward {response.reward:.6g}", f"{response.num_tokens} scored tokens"]
    parts.append(f"FuseSFT weight {response.sft_weight:.4f}" if response.sft_weight else "not in FuseSFT")
    if response.side:
        parts.append(f"{response.side} in FusePO, weight {response.pair_weight:.4f}")
    return ", ".join(parts)


STYLE = """body{font:14px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color-scheme:light dark}
pre{white-space:pre-wrap;overflow-wrap:anywhere;padding:.6em;border:1px solid #8888;border-radius:4px}
pre.scored{background:#2a24;border-color:#2a2}p{margin:.8em 0 .2em;opacity:.8}"""


def as_html(prompts: list[ShownPrompt], title: str) -> str:
    """A page of its own; what is scored has a green ground."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"]
    parts.append(f'<meta name=viewport content="width=device-width"><h1>{escape(title)}</h1>')
    for p in prompts:
        parts.append(f"<h2>Prompt {p.number}</h2><p>{escape(p.place)}, {p.num_tokens} tokens</p>")
        parts.append(f"<pre>{escape(p.text)}</pre>")
        for r in p.responses:
            parts.append(f"<p><b>{escape(r.source)}</b>: {escape(facts(r))} ({escape(r.place)})</p>")
            parts.append(f"<pre class=scored>{escape(r.text)}</pre>")
    return "\n".join([*parts, "</html>\n"])
