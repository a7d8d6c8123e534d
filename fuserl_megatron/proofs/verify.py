"""Are two models the same? Tensors to the bit, per-token log-probabilities, greedy continuations, config.

Each side is a Hugging Face directory or a Megatron checkpoint and is computed by its own native path (verify_sides.py),
so that agreement speaks for the whole conversion and not for one shared piece of code.

Shapes: T tokens.
"""

import dataclasses
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fuserl_megatron.config.keys import leaves
from fuserl_megatron.convert.copying import all_finite
from fuserl_megatron.convert.names import megatron_names
from fuserl_megatron.proofs.verify_sides import Side, Tokens, open_side, tokenizer_of
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import printable

MAX_TOKENS = 512  # of one text: a comparison needs no more
WINDOW = 2**23  # numbers compared at a time
TEXTS = (
    "The capital of France is",
    "Once upon a time, in a village at the foot of a mountain, there lived a clockmaker who",
    "2, 3, 5, 7, 11, 13, 17,",
    "Question: If a train travels 180 km in two and a half hours, what is its mean speed? Answer:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2021 GROUP BY",
    '{"name": "Ada", "born": 1815, "languages": ["English", "French"], "works":',
    "Water boils at 100 degrees Celsius at sea level because",
    "Der schnelle braune Fuchs springt über den faulen Hund, und danach",
    "El gato duerme en la ventana mientras la lluvia",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "To make bread you need flour, water, salt and",
    "The derivative of x^3 + 2x with respect to x is",
    "In 1969, two people walked on the Moon for the first time. Their names were",
    "A list of colours: red, green,",
    "<html>\n  <head>\n    <title>Example</title>\n  </head>\n  <body>",
    "Translate to French: Good morning, how are you?",
    "The mitochondrion is the part of the cell that",
    "Roses are red, violets are blue,",
    "Write a haiku about autumn leaves falling on still water.",
)


def verify(
    a: str | Path,
    b: str | Path,
    *,
    text: str | Path | None = None,
    threshold: float = 1e-5,
    json_path: str | Path | None = None,
    max_new_tokens: int = 32,
    hf: str | Path | None = None,
) -> int:
    """Compare two models, print a table, and say by the exit code whether they are the same.

    Args:
        a: Hugging Face directory, Megatron checkpoint, or results folder of a training run.
        b: the other one.
        text: file with one text a line, to be scored and continued; None for the built-in texts.
        threshold: largest difference of a token's log-probability that counts as equal, in nats.
        json_path: also write the figures there.
        max_new_tokens: length of the greedy continuations; 0 leaves them out.
        hf: directory with config and tokenizer for checkpoints that carry neither.

    Returns:
        0 when config, tensors and continuations are identical and no log-probability differs by more than the
        threshold, else 1.

    Raises:
        UserError: one of them is no model or is damaged; the text cannot be read.
    """
    if not threshold >= 0 or max_new_tokens < 0:
        raise UserError(f"threshold {threshold} and max_new_tokens {max_new_tokens} must not be negative")
    texts = _read_texts(text)
    sides = (open_side(a, hf), open_side(b, hf))
    report: dict[str, Any] = {"a": str(a), "b": str(b), "kinds": [side.kind for side in sides], "threshold": threshold}
    report["config"] = compare_configs(*sides)
    report["tensors"] = compare_tensors(*sides)
    report["problems"] = [side.problem for side in sides if side.problem]
    if not report["problems"]:
        tokens, report["tokenizer"] = _tokens(sides, texts, max_new_tokens)
        results = [_run(side, tokens, max_new_tokens) for side in sides]
        report["log_probabilities"] = _compare_logps([r[0] for r in results], threshold)
        if max_new_tokens:
            report["greedy"] = _compare_greedy([r[1] for r in results], max_new_tokens)
    parts = [report.get(name) for name in ("config", "tensors", "log_probabilities", "greedy")]
    report["same"] = not report["problems"] and all(part["same"] for part in parts if part is not None)
    _print_table(report)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["same"] else 1


def compare_configs(a: Side, b: Side) -> dict[str, Any]:
    """The fields that change what the model computes; dtype and unknown fields are left out."""
    plain = (dataclasses.replace(side.shape, raw={}, dtype=None) for side in (a, b))
    first, second = (dict(leaves(dataclasses.asdict(shape))) for shape in plain)
    different = {key: [first[key], second[key]] for key in first if first[key] != second[key]}
    return {"same": not different, "different": different}


def compare_tensors(a: Side, b: Side) -> dict[str, Any]:
    """Every tensor of both, one parameter at a time; the same dtype is compared bit for bit, others by value."""
    in_a, in_b = megatron_names(a.shape), megatron_names(b.shape)
    only = {"a": a.extra_names(), "b": b.extra_names()}
    compared, dtypes, different = 0, set(), {}
    not_finite: dict[str, list[str]] = {"a": [], "b": []}
    for name in dict.fromkeys(in_a + in_b):
        first, second = a.tensors(name) if name in in_a else {}, b.tensors(name) if name in in_b else {}
        for side, tensors in (("a", first), ("b", second)):
            not_finite[side] += [key for key, tensor in tensors.items() if not all_finite(tensor)]
        only["a"] += [key for key in first if key not in second]
        only["b"] += [key for key in second if key not in first]
        for key in first.keys() & second.keys():
            compared += 1
            dtypes.add((str(first[key].dtype), str(second[key].dtype)))
            difference = _difference(first[key], second[key])
            if difference is not None:
                different[key] = difference
    return {
        "same": not different and not only["a"] and not only["b"],
        "compared": compared,
        "different": different,
        "only_in": {side: sorted(set(found)) for side, found in only.items()},
        "not_finite": not_finite,
        "dtypes": sorted(dtypes),
    }


def _difference(first: torch.Tensor, second: torch.Tensor) -> float | str | None:
    """None for equal tensors, else the largest absolute difference, or the two shapes."""
    if first.shape != second.shape:
        return f"{list(first.shape)} and {list(second.shape)}"
    first, second = first.reshape(-1), second.reshape(-1)
    if first.dtype == second.dtype:
        if torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
            return None
    elif all(torch.equal(x.double(), y.double()) for x, y in _windows(first, second)):
        return None
    return max(float((x.double() - y.double()).abs().max()) for x, y in _windows(first, second))


def _windows(first: torch.Tensor, second: torch.Tensor):
    return zip(first.split(WINDOW), second.split(WINDOW), strict=True)


def _read_texts(file: str | Path | None) -> Sequence[str]:
    if file is None:
        return TEXTS
    try:
        texts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as text ({error}); give a UTF-8 file with one text a line") from None
    if not texts:
        raise UserError(f"{file}: holds no text; give a UTF-8 file with one text a line")
    return texts


def _tokens(sides: Sequence[Side], texts: Sequence[str], new_tokens: int) -> tuple[list[Tokens], str]:
    """The texts as token ids of at least two tokens, within both models' reach, and where the tokenizer came from."""
    vocabulary = min(side.shape.vocab_size for side in sides)
    reach = min(side.shape.max_position_embeddings for side in sides)
    longest = min(MAX_TOKENS, reach - new_tokens)
    if longest < 2:
        raise UserError(
            f"max_new_tokens {new_tokens}: leaves no room in the models' {reach} max_position_embeddings; "
            f"--max-new-tokens {max(0, reach - 2)} would work"
        )
    for side in sides:
        tokenizer = tokenizer_of(side)
        if tokenizer is not None:
            rows = [[t for t in tokenizer(line)["input_ids"] if t < vocabulary][:longest] for line in texts]
            rows = [row for row in rows if len(row) > 1]
            if rows:
                return rows, str(side.tokenizer_dir)
    if texts is not TEXTS:
        raise UserError(
            f"{sides[0].path}: no tokenizer to read the text with; leave --text out to compare on fixed token ids"
        )
    generator = torch.Generator().manual_seed(1)
    lengths = [min(longest, 8 + 3 * i) for i in range(len(TEXTS))]
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths], "none: fixed token ids"


def _run(side: Side, tokens: list[Tokens], new_tokens: int) -> tuple[torch.Tensor, list[Tokens]]:
    try:
        side.load()
        logps_T = torch.cat([side.token_logps(row) for row in tokens])
        return logps_T, side.greedy(tokens, new_tokens) if new_tokens else []
    finally:
        side.close()
        gc.collect()  # two models need not be in memory at one time


def _compare_logps(results: list[torch.Tensor], threshold: float) -> dict[str, Any]:
    differences_T = (results[0].double() - results[1].double()).abs()
    worst = float(differences_T.max())
    return {
        "same": worst <= threshold,  # NaN is not
        "tokens": differences_T.numel(),
        "largest_difference": worst,
        "mean_difference": float(differences_T.mean()),
        "mean": [float(r.double().mean()) for r in results],
    }


def _compare_greedy(results: list[list[Tokens]], count: int) -> dict[str, Any]:
    pairs = list(zip(*results, strict=True))
    agree = [next((i for i, (x, y) in enumerate(zip(*p, strict=True)) if x != y), count) for p in pairs]
    return {
        "same": all(n == count for n in agree),
        "prompts": len(pairs),
        "tokens_each": count,
        "identical": sum(n == count for n in agree),
        "agreeing_tokens": agree,
    }


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def text(words: str) -> Text:  # a path or a tensor's name is no markup
        return Text(printable(words, keep="\n"))

    sides = f"A  {report['a']} ({report['kinds'][0]})\nB  {report['b']} ({report['kinds'][1]})"
    table = Table(title=text(sides), title_justify="left")
    for column in ("compared", "result", ""):
        table.add_column(column, overflow="fold")

    def add(what: str, result: str, same: bool) -> None:
        table.add_row(what, text(result), "[green]same[/]" if same else "[red]DIFFERENT[/]")

    config, tensors = report["config"], report["tensors"]
    fields = ", ".join(f"{key}: {x} and {y}" for key, (x, y) in config["different"].items())
    add("config", fields or "every field that matters agrees", config["same"])
    add("tensors", _tensor_line(tensors), tensors["same"])
    for problem in report["problems"]:
        add("model", problem, False)
    if "log_probabilities" in report:
        logps = report["log_probabilities"]
        line = f"{logps['tokens']} tokens, largest difference {logps['largest_difference']:.2e} nats"
        add("log-probabilities", f"{line} (allowed {report['threshold']:.0e})", logps["same"])
    if "greedy" in report:
        greedy = report["greedy"]
        line = f"{greedy['identical']} of {greedy['prompts']} continuations of {greedy['tokens_each']} tokens identical"
        add("greedy text", line, greedy["same"])
    Console().print(table)


def _tensor_line(tensors: dict[str, Any]) -> str:
    lines = [f"{tensors['compared'] - len(tensors['different'])} of {tensors['compared']} identical"]
    for key, difference in list(tensors["different"].items())[:5]:
        lines.append(f"{key}: " + (difference if isinstance(difference, str) else f"differs by {difference:.2e}"))
    if len(tensors["different"]) > 5:
        lines.append(f"... and {len(tensors['different']) - 5} more")
    for side, names in tensors["not_finite"].items():
        if names:
            lines.append(
                f"not finite in {side.upper()}: {', '.join(names[:3])}{' ...' * (len(names) > 3)} ({len(names)})"
            )
    for side, names in tensors["only_in"].items():
        if names:
            lines.append(
                f"only in {side.upper()}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} ({len(names)})"
            )
    return "\n".join(lines)
