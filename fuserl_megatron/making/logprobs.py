"""`fuserl logprobs`: how likely every source finds every answer, also those of the others; each exactly once.

A directory for each source (accounting.py), with a row for each answer that is not empty and no repetition:
{"key": the answer's own, "mean_logp": nats a token, "tokens": how many}. `fuserl score logprobs=DIR` puts them into the
records as source_mean_logps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fuserl_megatron.config.sample_sections import LogprobsConfig, SourceConfig
from fuserl_megatron.making.accounting import Account, Plan
from fuserl_megatron.making.answers import DUPLICATE, EMPTY, AnswerTable, answers, check_inputs, scan_answers
from fuserl_megatron.making.client import Job
from fuserl_megatron.making.conductor import conduct
from fuserl_megatron.making.finished import account_directories, finished_rows, read_done, read_plan
from fuserl_megatron.making.logprob_source import LogprobSource
from fuserl_megatron.making.parts import key_array, key_of
from fuserl_megatron.making.preflight import Preflight
from fuserl_megatron.making.prompts import Prompt
from fuserl_megatron.making.sample import check_sources, need_aiohttp
from fuserl_megatron.making.source_run import SourceRun
from fuserl_megatron.runtime import stopping
from fuserl_megatron.util.errors import UserError

KIND = "log-probabilities of answers"
"""In the plan: such a directory is no directory of answers."""


class LogprobRun(SourceRun):
    """One source with all answers."""

    config: LogprobsConfig
    source: LogprobSource

    def __init__(self, config: LogprobsConfig, source: LogprobSource, table: AnswerTable):
        self.table, self._wanted = table, ~(table.has(EMPTY) | table.has(DUPLICATE))
        unusual = {"empty": int(table.has(EMPTY).sum()), "duplicates": int(table.has(DUPLICATE).sum())}
        notes = {"samples": list(config.samples), "expected": int(self._wanted.sum()), **unusual}
        super().__init__(config, source, plan_of(source, notes))

    def keys(self) -> np.ndarray:
        """[answers] their own names, in their order."""
        return self.table.keys[self._wanted]

    def jobs(self, account: Account) -> Iterator[Job]:
        """Answers without a value."""
        position = -1
        for wanted, answer in zip(self._wanted, answers(self.config.samples, self.table), strict=True):
            position += wanted
            if wanted and not account.have[position]:
                id = key_of(*answer.messages).hex()
                prompt = Prompt(-1, id, answer.record["prompt"], answer.messages, None, answer.place)
                yield Job(position, prompt, response=answer.response)

    def row(self, job: Job, answer: dict[str, Any], how: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """The value, and of how many tokens it is the mean."""
        return {name: answer[name] for name in ("mean_logp", "tokens", "token_ids", "top") if name in answer}

    def figures(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Mean over answers, and over their tokens."""
        count, total, tokens, nats = 0, 0.0, 0, 0.0
        for row in rows:
            count, total = count + 1, total + row["mean_logp"]
            tokens, nats = tokens + row["tokens"], nats + row["mean_logp"] * row["tokens"]
        return {"mean": total / max(count, 1), "mean_per_token": nats / max(tokens, 1), "tokens": tokens}

    async def prove(self, check: Preflight) -> list[str]:
        """As for sampling, and that the server gives the log-probabilities of a prompt."""
        return [*await super().prove(check), await self.source.prove(check)]


def plan_of(source: LogprobSource, notes: Mapping[str, Any]) -> Plan:
    """What changes a value: the model and the prompt, not how answers are drawn."""
    asked = source.prompt_settings()
    return Plan(settings={"what": KIND, **asked, "top_k": source.top_k}, notes=notes)


def open_logprobs(config: LogprobsConfig, sources: Sequence[SourceConfig]) -> list[LogprobRun]:
    """Read the answers once and prepare a run for each source. Writes nothing.

    Raises:
        UserError: no answers, or one that a source cannot be asked about.
    """
    if not config.samples:
        raise UserError("samples=[]: log-probabilities of which answers? Type samples=[DIR] (of `fuserl sample`).")
    need_aiohttp("logprobs")
    asked = [LogprobSource(source, config.top_k) for source in sources]
    check_sources(sources)
    check_inputs(config.samples)
    table = scan_answers(config.samples, ())
    base = [source for source in asked if source.config.kind == "completion"]
    for answer in answers(config.samples, table) if base else ():
        if answer.tools or (why := base[0].refuse(answer.messages)):
            why = "tools cannot be put to a completion source" if answer.tools else why
            raise UserError(f"{answer.place[0]}:{answer.place[1]}: {why}")
    return [LogprobRun(config, source, table) for source in asked]


def logprobs(config: LogprobsConfig, sources: Sequence[SourceConfig]) -> int:
    """Run until everything is there, or until a signal; returns the exit code.

    Raises:
        UserError: something the user can put right. What came until then is kept.
    """
    output = Path(config.output)
    stopping.remove_marker(output)
    runs = open_logprobs(config, sources)
    told = conduct(config, runs)
    for run in runs:
        if run.done is not None:
            figures, failed = run.done["figures"], run.done["failed"]
            lost = f", {failed:,} have none (failures.jsonl)" if failed else ""
            mean = f"mean {figures['mean']:.4g} nats a token"
            print(f"{run.source.name}: log-probabilities of {run.done['rows']:,} answers, {mean}{lost}", flush=True)
    if told:
        stopping.ask_for_more(output, f"stopped by {told}; everything that was answered is kept")
    return 0


def dry_run(config: LogprobsConfig, sources: Sequence[SourceConfig]) -> list[str]:
    """What a run would do, in lines, without a look at a server. Writes nothing."""
    lines = []
    for run in open_logprobs(config, sources):
        there = run.there()
        lines.append(f"{run.source.name}: {len(run.keys()):,} answers, {there:,} there")
    return lines


def read_logprobs(names: Sequence[str], keys: np.ndarray) -> dict[str, np.ndarray]:
    """Source -> [N] mean log-probabilities of the answers named by `keys` [N], NaN where there is none.

    Raises:
        UserError: an unfinished directory, or one of something else.
    """
    found: dict[str, np.ndarray] = {}
    order = np.argsort(keys, kind="stable")
    for name in names:
        for directory in account_directories(name):
            settings = read_plan(directory)["settings"]
            if settings.get("what") != KIND:
                raise UserError(f"logprobs: {directory} was not written by `fuserl logprobs`")
            if settings["source"] in found:
                raise UserError(f"logprobs: {directory}: source {settings['source']} is there twice; name it once")
            column = found[settings["source"]] = np.full(len(keys), np.nan)
            if not read_done(directory)["rows"]:
                continue
            pairs = [(bytes.fromhex(row["key"]), row["mean_logp"]) for row in finished_rows(directory)]
            theirs = key_array(key for key, _ in pairs)
            at = np.minimum(np.searchsorted(keys, theirs, sorter=order), len(keys) - 1)
            same = keys[order[at]] == theirs
            column[order[at][same]] = np.array([value for _, value in pairs])[same]
    return found
