"""`fuserl build`: scored responses -> fused data set.

Writes beside the output and renames at the end, so the output directory is the old one or the new one, whole.
"""

import errno
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fuserl_megatron.config.schema import BuildConfig, ObjectiveConfig
from fuserl_megatron.config.validate import validate_build
from fuserl_megatron.data.dataset import (
    FORMAT_VERSION,
    GROUPS_FILE,
    MANIFEST_FILE,
    REJECTED_FILE,
    ROWS_PER_BATCH,
    SCHEMA,
    SOURCE_LOGPS,
    FusedDataset,
    Manifest,
)
from fuserl_megatron.data.pairs import pair_table
from fuserl_megatron.data.rewards import reward_table
from fuserl_megatron.objectives.weights import effective_number_of_sources, source_weights
from fuserl_megatron.records.files import reader_of
from fuserl_megatron.records.format_reader import check_format
from fuserl_megatron.records.grouping import LoadedRecords, RecordGroup, check_source_names, load_groups
from fuserl_megatron.records.identity import identity_of
from fuserl_megatron.records.inputs import expand_inputs
from fuserl_megatron.records.messages import BadRecord, as_dicts
from fuserl_megatron.records.records import Rejects
from fuserl_megatron.records.temperature import TemperatureMissing, known_accuracy, scores_as_read, temperature
from fuserl_megatron.records.templates import BadPrompt
from fuserl_megatron.records.tokenize import ChatTokenizer
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import file_sha256, sync
from fuserl_megatron.util.progress import watched
from fuserl_megatron.util.whole_directory import create_partial, discard, publish

TEXT_COUNTS = (
    "responses_with_special_tokens",
    "prompts_with_special_tokens",
    "responses_stripped_by_template",
    "responses_rewrapped_by_template",
    "responses_cut_by_template",
    "prompts_with_the_date",
)
QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}


def build(config: BuildConfig, progress: bool = True) -> Manifest:
    """Read, check, tokenise and write one data set; returns the manifest, as written to disk.

    With `progress` a bar is shown when standard error is a terminal and it takes longer than a few seconds.

    Raises:
        UserError: anything in config or the records that the user can put right, or a full disk. Nothing is left over.
    """
    validate_build(config)
    output = _check_output(config)
    # a file that is not there is known before the seconds that a tokenizer takes
    check_format(config.format, config.fields)
    expand_inputs(config.inputs, own_reader=reader_of(config.reader) is not None)
    accuracy = known_accuracy(config)
    tokenizer = ChatTokenizer(config.tokenizer, config.chat_template, config.max_length, config.chat_template_kwargs)
    partial = create_partial(output, None, source_dir=None, force=True)
    try:
        _check_output(config)  # another build may have finished there before the lock was ours
        manifest = _write(config, accuracy, tokenizer, partial, progress)
        publish(partial, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left on the disk of {output.parent}: free some or set another output") from None
        if error.filename is None:
            raise UserError(f"output: {config.output} cannot be written ({error.strerror})") from None
        raise
    finally:
        discard(partial)
    return manifest


def _check_output(config: BuildConfig) -> Path:
    """The output path, or what is wrong with it before anything is read."""
    output = Path(config.output).resolve()
    if output.exists():
        if not output.is_dir():
            raise UserError(f"output: {config.output} is a file: name a directory")
        foreign = sorted(set(os.listdir(output)) - {GROUPS_FILE, MANIFEST_FILE, REJECTED_FILE})
        if foreign:
            what = f"{config.output} holds files that are not a fused data set's ({foreign[0]})"
            raise UserError(f"output: {what}: name another directory")
        if any(output.iterdir()) and not config.force:
            raise UserError(f"output: {config.output} exists: set force=true to replace it, or name another directory")
    return output


def _write(
    config: BuildConfig, accuracy: dict[str, Any] | None, tokenizer: ChatTokenizer, partial: Path, progress: bool
) -> Manifest:
    with open(partial / REJECTED_FILE, "w", encoding="utf-8") as rejected:
        rejects = Rejects(config.on_bad_record, rejected)
        loaded = load_groups(
            config.inputs,
            rejects,
            config.sources,
            lambda rows: watched(rows, None, "reading", progress),
            config.second_reward,
            reader_of(config.reader),
            config.format,
            config.fields,
            config.on_repeated,
        )
        if config.reward_temperature != "auto" and math.isnan(config.reward_temperature):
            raise TemperatureMissing(scores_as_read(config, loaded))
        counts: Counter[str] = Counter()
        rows = _tokenize(loaded, tokenizer, rejects, counts)
        schema = SCHEMA.append(SOURCE_LOGPS) if check_source_names(loaded, bool(config.sources)) else SCHEMA
        if not _write_groups(partial / GROUPS_FILE, schema, watched(rows, len(loaded.groups), "tokenising", progress)):
            why = ", ".join(f"{kind} {n}" for kind, n in rejects.counts.items())
            raise UserError(f"every record was rejected ({why}): correct the inputs or raise max_length")
        sync(rejected)
    if not rejects.skip:
        (partial / REJECTED_FILE).unlink()
    manifest = _describe(config, accuracy, tokenizer, loaded, rejects, counts, partial / GROUPS_FILE)
    with open(partial / MANIFEST_FILE, "w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        sync(file)
    return manifest


def _tokenize(
    loaded: LoadedRecords, tokenizer: ChatTokenizer, rejects: Rejects, counts: Counter[str]
) -> Iterator[dict[str, Any] | None]:
    """One row of groups.arrow per prompt; None for a prompt that lost all its responses."""
    input_ids = {entry["name"]: i for i, entry in enumerate(loaded.inputs)}
    for group in loaded.groups:
        row = _tokenize_group(group, loaded.sources, input_ids, tokenizer, rejects, counts)
        counts["prompts_without_response"] += row is None
        yield row


def _tokenize_group(
    group: RecordGroup,
    sources: list[str],
    input_ids: dict[str, int],
    tokenizer: ChatTokenizer,
    rejects: Rejects,
    counts: Counter[str],
) -> dict[str, Any] | None:
    def reject(bad: BadRecord, source_id: int, text: str, reward: float) -> None:
        record = {"prompt": as_dicts(group.messages), "source": sources[source_id], "response": text, "reward": reward}
        rejects.add(bad, record | ({"tools": json.loads(group.tools)} if group.tools else {}))

    entries = [(source_id, text, reward, place) for (source_id, text), (reward, place) in group.responses.items()]
    try:
        prompt = tokenizer.encode_prompt(group.messages, group.tools)
    except BadPrompt as error:
        for source_id, text, reward, place in entries:
            reject(BadRecord(place, error.kind, f"field 'prompt': {error}"), source_id, text, reward)
        return None
    row: dict[str, Any] = {name: [] for name in (*SCHEMA.names, SOURCE_LOGPS.name)} | {"prompt": prompt.tokens}
    encoded = tokenizer.encode_responses(prompt, [(text, place) for _, text, _, place in entries])
    for result, (source_id, text, reward, place) in zip(encoded, entries, strict=True):
        if isinstance(result, BadRecord):
            reject(result, source_id, text, reward)
            continue
        logps = group.source_mean_logps.get((source_id, text), {})
        row[SOURCE_LOGPS.name].extend(logps.get(name, math.nan) for name in sources)
        row["responses"].append(result.tokens)
        row["source_ids"].append(source_id)
        row["rewards"].append(reward)
        row["truncated"].append(result.truncated)
        row["inputs"].append(input_ids[place[0]])
        row["lines"].append(place[1])
        counts["truncated_responses"] += result.truncated
        counts["responses_with_special_tokens"] += result.special_in_text
        counts[f"responses_{result.change}_by_template"] += result.change is not None
    if not row["responses"]:
        return None
    counts["prompts_with_special_tokens"] += prompt.special_in_text
    counts["prompts_with_the_date"] += prompt.dated
    return row


def _write_groups(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any] | None]) -> int:
    """Stream the rows to disk; returns how many there were."""
    num_rows = 0
    with open(path, "wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            kept = (row for row in rows if row is not None)
            while waiting := list(islice(kept, ROWS_PER_BATCH)):
                columns = [_list_array([row[column.name] for row in waiting], column.type) for column in schema]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
                num_rows += len(waiting)
        sync(file)
    return num_rows


def _list_array(lists: list[list], kind: pa.ListType) -> pa.ListArray:
    """Lists through numpy: several times faster than Arrow's own conversion of nested Python lists."""
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    items = chain.from_iterable(lists)
    if pa.types.is_list(kind.value_type):
        return pa.ListArray.from_arrays(offsets, _list_array(list(items), kind.value_type))
    return pa.ListArray.from_arrays(offsets, pa.array(np.fromiter(items, kind.value_type.to_pandas_dtype())))


def _describe(
    config: BuildConfig,
    accuracy: dict[str, Any] | None,
    tokenizer: ChatTokenizer,
    loaded: LoadedRecords,
    rejects: Rejects,
    counts: Counter[str],
    file: Path,
) -> Manifest:
    data = FusedDataset.from_arrow(file)
    num_sources = len(loaded.sources)
    table = reward_table(data.response_offsets, data.source_ids, data.rewards, num_sources)
    scores_GK = table.scores(config.reward_standardization, config.score_aggregation)
    tau, rule = temperature(config, accuracy, scores_GK, loaded, data)
    weights_GK = source_weights(scores_GK, None, tau)
    effective_G = effective_number_of_sources(weights_GK).numpy()
    present_GK = table.mask_GKN.any(dim=2)
    best_GK = (scores_GK == scores_GK.amax(dim=1, keepdim=True)) & present_GK
    wins_K = (best_GK.double() / best_GK.sum(dim=1, keepdim=True)).mean(dim=0)
    per_source = {}
    for k, name in enumerate(loaded.sources):
        rewards = data.rewards[data.source_ids == k]
        per_source[name] = {
            "responses": int(rewards.size),
            "prompts": int(present_GK[:, k].sum()),
            "mean_reward": float(rewards.mean()) if rewards.size else 0.0,
            "mean_weight": float(weights_GK[:, k].mean()),
            "win_rate": float(wins_K[k]),
        }
    total = data.response_lengths + np.repeat(data.prompt_lengths, np.diff(data.response_offsets))
    return Manifest(
        format_version=FORMAT_VERSION,
        hash=file_sha256(file),
        num_bytes=file.stat().st_size,
        sources=loaded.sources,
        reward_temperature=tau,
        temperature_rule=rule,
        score_aggregation=config.score_aggregation,
        reward_standardization=config.reward_standardization,
        max_length=config.max_length,
        tokenizer=config.tokenizer,
        tokenizer_hash=tokenizer.hash,
        chat_template_hash=tokenizer.template_hash,
        chat_template=tokenizer.template,
        chat_template_given=config.chat_template is not None,
        template_kwargs=dict(tokenizer.template_kwargs),
        end_of_turn=tokenizer.end_of_turn,
        end_of_turn_id=tokenizer.tokenizer.convert_tokens_to_ids(tokenizer.end_of_turn),
        identity=identity_of(tokenizer, config.tokenizer, data),
        max_token_id=data.max_token_id,
        num_prompts=data.num_groups,
        num_responses=data.num_responses,
        counts={
            "records": loaded.counts["records"],
            "rejected_records": rejects.counts.total(),
            "duplicate_records": loaded.counts["duplicates"],
            "filtered_by_source": loaded.counts["filtered_by_source"],
            "prompts_without_response": counts["prompts_without_response"],
            "prompts_missing_a_source": int((~present_GK).any(dim=1).sum()),
            "truncated_responses": counts["truncated_responses"],
            **{name: counts[name] for name in TEXT_COUNTS},
            **pair_table(data, ObjectiveConfig(stage="fusepo"), table).counts,
        },
        rejected=dict(rejects.counts),
        unknown_keys=dict(loaded.unknown_keys),
        tokens={
            "prompt_mean": float(data.prompt_lengths.mean()),
            "prompt_max": int(data.prompt_lengths.max()),
            "response_mean": float(data.response_lengths.mean()),
            "response_max": int(data.response_lengths.max()),
            "total_max": int(total.max()),
            "prompt_total": int(data.prompt_lengths.sum()),
            "response_total": int(data.response_lengths.sum()),
        },
        per_source=per_source,
        effective_number_of_sources={
            "mean": float(effective_G.mean()),
            "min": float(effective_G.min()),
            **{name: float(np.quantile(effective_G, q)) for name, q in QUANTILES.items()},
            "max": float(effective_G.max()),
        },
        inputs=loaded.inputs,
    )
