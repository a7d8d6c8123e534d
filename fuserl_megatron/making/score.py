"""`fuserl score`: answers -> answers with rewards.

output/rewards/NAME holds the values of one reward, row by row and exactly once (accounting.py), so a killed run goes
on where it was, another reward is scored alone, and other weights or policies score nothing again. Then everything is
joined into output/records.jsonl, which `fuserl build` reads; done.json is written last.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fuserl_megatron.config.keys import leaves
from fuserl_megatron.config.score_sections import Reward, ScoreConfig
from fuserl_megatron.making.accounting import DONE, PLAN, Account, Plan, check_plan, now
from fuserl_megatron.making.answers import (
    Answer,
    AnswerTable,
    answers,
    check_inputs,
    heldout_marks,
    scan_answers,
)
from fuserl_megatron.making.finished import account_directories, read_done
from fuserl_megatron.making.join import RECORDS, combined, needed, read_values, truncated_policy, write_records
from fuserl_megatron.making.logprobs import read_logprobs
from fuserl_megatron.making.rewards import asked, open_reward
from fuserl_megatron.making.score_report import describe, write_html
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import write_file
from fuserl_megatron.util.json_files import read_json
from fuserl_megatron.util.locks import only_writer
from fuserl_megatron.util.progress import watched

REWARDS = "rewards"
REPORT = "report.json"
FORMAT = "fuserl scored responses"
ALIKE = 20
"""So many failures in a row from the start, all for one reason, are no trouble of single rows."""
SYNC_S, LINE_S = 1.0, 60.0
Say = Callable[[str], None]


@dataclasses.dataclass
class Prepared:
    """Everything that is known before a reward is opened."""

    config: ScoreConfig
    rewards: Mapping[str, Reward]
    table: AnswerTable
    keep: np.ndarray
    """[N] the answers to score."""
    dropped: dict[str, int]

    @property
    def directories(self) -> dict[str, Path]:
        """Where each reward's values are."""
        return {name: Path(self.config.output, REWARDS, name) for name in self.rewards}


def prepare(config: ScoreConfig, rewards: Mapping[str, Reward], progress: bool = True) -> Prepared:
    """Read the answers once and say which are scored. Writes nothing.

    Raises:
        UserError: anything in the settings or the inputs that the user can put right.
    """
    check_inputs(config.samples)
    for name in config.logprobs:
        for directory in account_directories(name):
            read_done(directory)
    heldout = heldout_marks(config.heldout, config.heldout_ngram) if config.heldout else set()
    phrases = config.policy.refusal_phrases
    table = scan_answers(
        config.samples, phrases, heldout, config.heldout_ngram, lambda r: watched(r, None, "reading", progress)
    )
    keep, dropped = needed(table, config, rewards)
    return Prepared(config, rewards, table, keep, dropped)


def score(
    config: ScoreConfig, rewards: Mapping[str, Reward], progress: bool = True, say: Say = print
) -> dict[str, Any]:
    """Score what has no value yet, join, report; returns the report, as written to report.json.

    Raises:
        UserError: in one line. What was scored stays, and the same command goes on.
    """
    output = Path(config.output)
    _check_output(output)
    with only_writer(output / ".lock", config.output, "choose another output"):
        prepared = prepare(config, rewards, progress)
        plans = {name: score_one(prepared, name, progress, say) for name in prepared.rewards}
        return _join(prepared, plans, say)


def score_one(prepared: Prepared, name: str, progress: bool = True, say: Say = print) -> dict[str, Any]:
    """Give every answer that needs one a value of this reward; returns the plan: settings and notes.

    Raises:
        UserError: the reward cannot be had, another plan has written there, nothing has a value.
    """
    reward, directory = prepared.rewards[name], prepared.directories[name]
    keys = prepared.table.keys[prepared.keep]
    anew = name in prepared.config.rescore
    if not anew and (found := _complete(reward, directory, keys)):
        return found
    with open_reward(name, reward) as scorer:
        for line in scorer.warnings():
            say(f"WARNING: {line}")
        notes = scorer.notes() | {"answers": len(keys)}
        plan = Plan({"reward": asked(reward), "found": scorer.settings()}, notes)
        with _opened(directory, plan, keys, name, anew) as account:
            if account.torn:
                say(account.torn)
            if not account.is_finished():
                Path(prepared.config.output, DONE).unlink(
                    missing_ok=True
                )  # what was joined before is not what is asked
                _fill(prepared, name, account, scorer, progress, say)
    return {"settings": plan.settings, "notes": plan.notes}


def _complete(reward: Reward, directory: Path, keys: np.ndarray) -> dict[str, Any] | None:
    """The plan of a directory with all values, so that the model is not loaded to find out. A rule is always asked
    for: its code may have changed, and it costs nothing."""
    if reward.kind == "rule" or not (directory / PLAN).is_file():
        return None
    there = read_json(directory / PLAN)
    same_model = reward.kind != "model" or there["notes"].get("model") == reward.model
    if there["settings"].get("reward") != json.loads(json.dumps(asked(reward))) or not same_model:
        return None
    with Account(directory, Plan(there["settings"], there["notes"]), keys) as account:
        if len(account.missing()):
            return None
        if not account.is_finished():  # fewer answers are wanted than before
            account.finish({})
    return there


def _opened(directory: Path, plan: Plan, keys: np.ndarray, name: str, anew: bool) -> Account:
    """The account, or why it is not ours with the way out that a reward has. `anew` throws away what is there, unless
    it is the unfinished beginning of the same: a command that was stopped goes on."""
    try:
        check_plan(directory, plan)
        if anew and (directory / DONE).is_file():
            shutil.rmtree(directory)
    except UserError as error:
        if anew:
            shutil.rmtree(directory)
            return Account(directory, plan, keys)
        what = str(error).removesuffix("; choose another output")
        raise UserError(
            f"{what}; type rescore=[{name}] to throw its values away, or give the reward another name"
        ) from None
    return Account(directory, plan, keys)


def _fill(prepared: Prepared, name: str, account: Account, scorer: Any, progress: bool, say: Say) -> None:
    started = synced = told = time.monotonic()
    written = 0
    missing = np.zeros(len(account.keys), bool)
    missing[account.missing()] = True
    first: list[tuple[int, dict[str, Any]]] = []  # held back until one has a value: a broken rule must leave no rows
    holding = True
    outcomes = scorer.outcomes(_wanted(prepared, missing))
    for row in watched(outcomes, int(missing.sum()), f"reward {name}", progress):
        first.append(row)
        if holding and "error" in row[1] and len(first) < ALIKE:
            continue
        if holding:
            _refuse_all_alike(name, prepared.rewards[name], first)
        holding = False
        for held in first:
            account.append(*held)
        written, first = written + len(first), []
        if time.monotonic() - synced > SYNC_S:
            account.sync()
            synced = time.monotonic()
            if synced - told > LINE_S and not sys.stderr.isatty():  # where a bar is drawn nobody needs lines
                told = synced
                say(_line(name, written, int(missing.sum()), synced - started))
    if first and not account.have.any():
        raise UserError(f"rewards.{name}: no answer has a value: {first[0][1]['error']}")
    for held in first:
        account.append(*held)
    facts = {"seconds": round(time.monotonic() - started, 3), "scored": written + len(first)}
    account.finish({**facts, "restarts": getattr(scorer, "num_restarts", 0)})


def _line(name: str, written: int, total: int, seconds: float) -> str:
    """A sign of life in a log."""
    pace = written / seconds
    return (
        f"reward {name}: {written:,} of {total:,}, {pace:.3g} a second, {(total - written) / pace / 60:,.0f} min to go"
    )


def _refuse_all_alike(name: str, reward: Reward, held: list[tuple[int, dict[str, Any]]]) -> None:
    words = {re.sub(r"\d+", "N", outcome.get("error", "")) for _, outcome in held}
    if len(words) == 1 and words != {""} and reward.kind != "model":  # a model refuses single answers only
        why = held[0][1]["error"]
        raise UserError(f"rewards.{name}: the first {len(held)} answers have no value, all for one reason: {why}")


def _wanted(prepared: Prepared, missing: np.ndarray) -> Iterator[tuple[int, Answer]]:
    """(position among the keys of this reward, sample) of those without a value."""
    position = -1
    for kept, sample in zip(prepared.keep, answers(prepared.config.samples, prepared.table), strict=True):
        position += kept
        if kept and missing[position]:
            yield position, sample


def _join(prepared: Prepared, plans: dict[str, Any], say: Say) -> dict[str, Any]:
    config, table, keep = prepared.config, prepared.table, prepared.keep
    output = Path(config.output)
    values = read_values(
        prepared.directories, keep, [name for name, _ in leaves(config.combine.weights) if name not in prepared.rewards]
    )
    truncated = truncated_policy(config.policy, prepared.rewards)
    values.logps = read_logprobs(config.logprobs, table.keys)
    total, failed = combined(values, table, keep, config.combine, config.policy, truncated)
    if np.isnan(total).all():
        why = ", ".join(f"{kind} {n:,}" for errors in values.errors.values() for kind, n in errors.most_common(3))
        raise UserError(f"no answer has all its rewards ({why}); see {output / REWARDS}")
    plan = _plan(config, table, plans)
    done = output / DONE
    if done.is_file() and read_json(done).get("plan") == plan and (output / REPORT).is_file():
        say(f"{output}: complete; nothing was scored or joined anew")
        return read_json(output / REPORT)
    done.unlink(missing_ok=True)
    partial = output / f"{RECORDS}.partial"
    try:
        written = write_records(partial, config.samples, table, total, values)
        os.replace(partial, output / RECORDS)
    finally:
        partial.unlink(missing_ok=True)
    dropped = {**prepared.dropped, "failed": failed}
    report = describe(prepared, values, total, dropped, plans)
    write_file(output / REPORT, [json.dumps(report, indent=2).encode() + b"\n"])
    write_html(output / "report.html", report)
    about = {"format": FORMAT, "finished": now(), "records": written, "bytes": (output / RECORDS).stat().st_size}
    write_file(done, [json.dumps({**about, "plan": plan}, indent=2).encode() + b"\n"])
    return report


def _plan(config: ScoreConfig, table: AnswerTable, plans: dict[str, Any]) -> dict[str, Any]:
    """What records.jsonl follows from."""
    settings = dataclasses.asdict(config)
    names = ("combine", "policy", "logprobs", "heldout", "heldout_ngram", "heldout_action")
    keys = hashlib.sha256(table.keys.tobytes() + table.flags.tobytes()).hexdigest()
    rewards = {name: plan["settings"] for name, plan in plans.items()}
    logprobs = [read_done(directory) for name in config.logprobs for directory in account_directories(name)]
    settings["logprobs"] = [[done["plan_id"], done["finished"]] for done in logprobs]
    chosen = {"rewards": rewards, **{name: settings[name] for name in names}, "samples_sha256": keys}
    return json.loads(json.dumps(chosen))


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output}: is a file; name a directory")
    ours = {REWARDS, RECORDS, f"{RECORDS}.partial", REPORT, "report.html", DONE, ".lock"}
    if output.is_dir() and (foreign := sorted(set(os.listdir(output)) - ours)):
        raise UserError(f"output={output}: holds files of something else ({foreign[0]}); name another directory")
