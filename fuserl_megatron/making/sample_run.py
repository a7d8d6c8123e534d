"""One source of `fuserl sample`: every prompt n times."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fuserl_megatron.config.sample_sections import SampleConfig
from fuserl_megatron.making.accounting import PLAN, Account
from fuserl_megatron.making.client import Job
from fuserl_megatron.making.finished import SHARD, shard_names
from fuserl_megatron.making.parts import key_array
from fuserl_megatron.making.preflight import Preflight
from fuserl_megatron.making.prompts import PromptList
from fuserl_megatron.making.sample_report import ENOUGH_TWINS, Twins, figures_of
from fuserl_megatron.making.source_run import SourceRun
from fuserl_megatron.making.sources import Source, key_of_answer, row_of, seed_of
from fuserl_megatron.util.errors import UserError

ALL_THE_SAME = (
    f"the answers to each of {ENOUGH_TWINS} prompts are the same: does the server obey temperature? "
    "(`transformers serve` samples only if the model's generation_config.json says do_sample)"
)


class SampleRun(SourceRun):
    """All answers of one source."""

    config: SampleConfig

    def __init__(self, config: SampleConfig, source: Source, prompts: PromptList, shard: int = 0):
        counts = {name: count for name, count in prompts.counts.items() if not name.startswith("ignored_")}
        notes = {"prompts": prompts.names, "expected": len(prompts) * config.n, "num_prompts": len(prompts)}
        super().__init__(config, source, source.plan(config, notes | counts | {"n": config.n}))
        self.prompts, self._twins = prompts, Twins()
        if config.shards > 1:
            self.directory = self.directory / shard_names(config.shards)[shard]

    def open(self, stack: contextlib.ExitStack, say: Callable[[str], None]) -> None:
        """Also refuses a number of shards that is not the one before: answers would be had twice."""
        parent = self.directory.parent if self.config.shards > 1 else self.directory
        there = {path.name for path in parent.glob(f"{SHARD}*")}
        if (self.config.shards > 1 and (parent / PLAN).is_file()) or there - set(shard_names(self.config.shards)):
            before = int(min(there).rpartition("-")[2]) if there else 1
            what = f"was sampled with shards={before}, not {self.config.shards}"
            raise UserError(f"{parent}: {what}; give the same number, or choose another output")
        super().open(stack, say)

    def keys(self) -> np.ndarray:
        """[prompts x n] the names of all answers, prompt by prompt."""
        plan_id, name = self.plan.id, self.source.name
        ids = self.prompts.ids.tobytes()
        texts = (ids[at : at + 16].hex() for at in range(0, len(ids), 16))
        return key_array(key_of_answer(plan_id, name, text, i) for text in texts for i in range(self.config.n))

    def jobs(self, account: Account) -> Iterator[Job]:
        """What is missing, the answers to one prompt together: a server computes the prompt once for them."""
        n = self.config.n
        missing = ~account.have.reshape(len(self.prompts), n)
        for prompt in self.prompts.read(np.asarray(missing.any(axis=1))):
            for index in np.flatnonzero(missing[prompt.number]).tolist():
                position = prompt.number * n + index
                yield Job(position, prompt, index, seed_of(account.keys[position : position + 1].tobytes()))

    def row(self, job: Job, answer: dict[str, Any], how: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """The answer with its prompt, and how it was asked."""
        if self._twins.seen(job.prompt.number, answer["response"]):
            say(f"WARNING: {self.source.name}: {ALL_THE_SAME}")
        return row_of(self.source, job.prompt, job.index, answer, how)

    def figures(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """As sample_report.py has them."""
        return figures_of(rows)

    async def prove(self, check: Preflight) -> list[str]:
        """Also whether the longest prompts fit."""
        return (await check.check(self.prompts.longest, self.config.on_too_long)).facts
