"""The README.md of an exported model: metadata that the hub reads, what was fused, figures, how to use it.

No path of the machine it was made on stands in it: of a local directory only the last name is said.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
from pathlib import Path
from typing import Any

import fuserl_megatron
from fuserl_megatron.config.schema import RunConfig

LICENSES = {
    "apache license version 2.0": "apache-2.0",
    "mit license": "mit",
    "llama 3.1 community license": "llama3.1",
    "llama 3.2 community license": "llama3.2",
    "llama 3.3 community license": "llama3.3",
    "meta llama 3 community license": "llama3",
    "llama 2 community license": "llama2",
    "gemma terms of use": "gemma",
}
"""First words of a licence's file -> the hub's name of it."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TAG = "fuserl-megatron"
STAGES = {"fusesft": "FuseSFT (reward-weighted SFT)", "fusepo": "FusePO (reward-weighted preference optimisation)"}


def model_card(name: str, lineage: dict[str, Any], directory: Path | None = None, library: str = "transformers") -> str:
    """The text of the card.

    Args:
        name: the directory's name: the title where the lineage names no run.
        lineage: where the weights come from, JSON-able. Of its keys `target` (the model they started from), `name`
            (of the run), `stage`, `sources`, `data` (figures of the data set), `figures` (metric -> {"first", "last"})
            and `versions` are told in words; all of it is printed as a record.
        directory: the model that is being written, with the licence files copied from its source.
        library: what the hub is told to load it with.
    """
    base, config = base_model(lineage.get("target")), lineage.get("config") or {}
    stage = lineage.get("stage") or (config.get("objective") or {}).get("stage")
    named = lineage.get("name") not in (None, RunConfig().name) and lineage["name"]
    title = named or (
        name if name not in ("hf", "adapter") else f"{(base or 'model').rpartition('/')[2]}-{stage or 'fused'}"
    )
    data = lineage.get("data") or {}
    target = lineage.get("target")
    metadata = {
        "base_model": base,
        **(
            (license_of(Path(target)) if isinstance(target, str) else {})
            or (license_of(directory) if directory else {})
        ),
        "datasets": [name for name in data.get("hub", ()) if HUB_ID.fullmatch(name)],
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [TAG, *([stage] if stage else [])],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value), "---", ""]
    lines += [f"# {_plain(str(title))}", ""]
    made = f"{_plain(base)}, trained" if base else "Written"
    lines += [f"{made} with fuserl-megatron, which fuses several source models into one target (FuseRL).", ""]
    lines += _fused(lineage, stage, data) + _figures(lineage.get("figures") or {}) + _usage(lineage)
    record = _without_paths({k: v for k, v in lineage.items() if k != "versions"})
    lines += ["## Record", "", "| | |", "|---|---|"]
    simple = {key: value for key, value in record.items() if not isinstance(value, dict | list)}
    lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in (simple | _versions(lineage)).items()]
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
    lines += ["", "<details><summary>All settings</summary>", "", "```json", text, "```", "", "</details>", ""]
    return "\n".join(lines)


def base_model(target: object) -> str | None:
    """The hub's name of the model that a path stands for, where the hub's cache or the model's config knows it;
    otherwise the directory's own name."""
    if not isinstance(target, str) or not target:
        return None
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", target)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if HUB_ID.fullmatch(target) and not os.path.exists(target):
        return target
    path = Path(target)
    ours = _front_matter(path / "README.md")
    if TAG in (ours.get("tags") or ()) and isinstance(ours.get("base_model"), str):
        return ours["base_model"]  # a stage before this one wrote it
    known = _json(path / "config.json").get("_name_or_path")
    if isinstance(known, str) and HUB_ID.fullmatch(known) and not os.path.exists(known):
        return known
    name = Path(os.path.abspath(target)).name
    parent = Path(os.path.abspath(target)).parent.name
    return f"{parent}-{name}" if name == "hf" else name  # runs/sft/hf is the model of run sft


def license_of(source: Path) -> dict[str, str]:
    """license, and license_name and license_link where the source's card has them; {} where nothing says it."""
    if (found := _front_matter(source / "README.md")).get("license"):
        return {key: str(found[key]) for key in ("license", "license_name", "license_link") if found.get(key)}
    for file in sorted([*source.glob("LICENSE*"), *source.glob("LICENCE*")]):
        try:
            words = " ".join(
                re.findall(r"[a-z0-9.]+", file.read_text(encoding="utf-8", errors="replace")[:600].lower())
            )
        except OSError:
            continue
        for start, name in LICENSES.items():
            if start in words:
                return {"license": name}
    return {}


def run_figures(directory: Path) -> dict[str, dict[str, float]]:
    """Loss of training and held-out metrics at the beginning and end of a run, from its metrics.jsonl and
    validation.jsonl; what cannot be read is left out."""
    figures = {}
    for file, wanted in (("metrics.jsonl", "loss"), ("validation.jsonl", "val_")):
        rows = [row for row in _lines(directory / file) if isinstance(row, dict)]
        for name in [key for key in (rows[-1] if rows else {}) if key == wanted or key.startswith("val_")]:
            first, last = rows[0].get(name), rows[-1][name]
            if all(isinstance(v, int | float) and math.isfinite(v) for v in (first, last)) and name != "val_prompts":
                figures[name] = {"first": first, "last": last}
    return figures


def _fused(lineage: dict[str, Any], stage: str | None, data: dict[str, Any]) -> list[str]:
    sources = [str(source) for source in lineage.get("sources") or ()]
    if not sources and not data:
        return []
    lines = ["## What was fused", ""]
    if stage:
        loss = ((lineage.get("config") or {}).get("objective") or {}).get("loss")
        lines.append(f"- stage: {STAGES.get(stage, stage)}{f', loss {loss}' if loss else ''}")
    if sources:
        lines.append(f"- sources: {', '.join(map(_plain, sources))}")
    if data:
        counted = f"{data['num_prompts']:,} prompts, {data['num_responses']:,} responses"
        lines.append(f"- data: {counted}, reward temperature {data['reward_temperature']}")
    return [*lines, ""]


def _figures(figures: dict[str, dict[str, float]]) -> list[str]:
    if not figures:
        return []
    rows = [f"| {_cell(name)} | {v['first']:.5g} | {v['last']:.5g} |" for name, v in figures.items()]
    return ["## Figures", "", "| | first | last |", "|---|---|---|", *rows, ""]


def _usage(lineage: dict[str, Any]) -> list[str]:
    arguments = "".join(f", {name}={value!r}" for name, value in (lineage.get("template_kwargs") or {}).items())
    return [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'directory = "."  # where this file lies',
        "tokenizer = AutoTokenizer.from_pretrained(directory)",
        'model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")',
        'messages = [{"role": "user", "content": "Hello!"}]',
        f"inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True{arguments}, "
        'return_tensors="pt", return_dict=True)',
        "output = model.generate(**inputs, max_new_tokens=256)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        "```",
        "",
    ]


def _versions(lineage: dict[str, Any]) -> dict[str, Any]:
    packages = {"python": platform.python_version(), "fuserl-megatron": fuserl_megatron.__version__}
    for package in ("torch", "megatron-core", "transformers", "safetensors"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return packages | dict(lineage.get("versions") or {})


def _without_paths(value: Any) -> Any:
    """The same without nulls and empty parts, and with the last name alone of each absolute path."""
    if isinstance(value, dict):
        values = {key: _without_paths(item) for key, item in value.items()}
        return {key: item for key, item in values.items() if item is not None and item != {} and item != []}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and (value.startswith(("/", "~")) or ":\\" in value)):
        return Path(str(value)).name
    return value


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _lines(file: Path) -> list[Any]:
    """The first and the last row of a JSONL file."""
    try:
        rows = [row for row in file.read_text(encoding="utf-8").splitlines() if row.strip()]
        return [json.loads(rows[0]), json.loads(rows[-1])] if rows else []
    except (OSError, ValueError, RecursionError):
        return []


def _front_matter(card: Path) -> dict[str, Any]:
    import yaml

    try:
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8"), re.DOTALL)
        values = yaml.safe_load(found[1]) if found else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _plain(text: str) -> str:
    """Text of others without line breaks and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _cell(value: Any) -> str:
    return _plain(str(value)).replace("|", "\\|")
