"""One source of a run: what is missing, who is asked for it, and its last file."""

import abc
import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fuserl_megatron.config.sample_sections import AskConfig, SourceConfig
from fuserl_megatron.making.accounting import Account, Plan, check_plan, now
from fuserl_megatron.making.client import Client, Job
from fuserl_megatron.making.endpoint import Endpoint
from fuserl_megatron.making.faults import Fault
from fuserl_megatron.making.finished import read_done
from fuserl_megatron.making.parts import num_parts, scan
from fuserl_megatron.making.preflight import Preflight
from fuserl_megatron.making.sample_display import Display, Pace
from fuserl_megatron.making.servers import OwnServer
from fuserl_megatron.making.sources import Source
from fuserl_megatron.util.credentials import key_of_environment

SYNC_S = 1.0
RUNS = "runs.jsonl"


class SourceRun(abc.ABC):
    """One source of a run. `fuserl sample` and `fuserl logprobs` say what is asked and what is kept of it.

    Attributes:
        done: the content of its done.json, when it is finished.
        client: while it is asked.
    """

    def __init__(self, config: AskConfig, source: Source, plan: Plan):
        self.config, self.source = config, source
        self.directory = Path(config.output) / source.name
        self.headers = _headers(source.config)
        self.done: dict[str, Any] | None = None
        self.client: Client | None = None
        self.plan = dataclasses.replace(plan, notes=dict(plan.notes) | {"settings": _told(source.config)})
        self.servers: list[OwnServer] = []
        self._is_stopped = False
        self._starting: asyncio.Task | None = None

    @property
    def name(self) -> str:
        """What it is called in tables: its source, with the shard where there are several."""
        return str(self.directory.relative_to(self.config.output))

    @abc.abstractmethod
    def keys(self) -> np.ndarray:
        """[rows] the names of all that is to be had."""

    @abc.abstractmethod
    def jobs(self, account: Account) -> Iterator[Job]:
        """What is missing, read as it is needed."""

    @abc.abstractmethod
    def row(self, job: Job, answer: dict[str, Any], how: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """What is kept of an answer."""

    @abc.abstractmethod
    def figures(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """What done.json says of all rows."""

    async def prove(self, check: Preflight) -> list[str]:
        """Look at one server before anything is asked; what was found, as lines to print.

        Raises:
            UserError: one line for the first thing that is wrong.
        """
        return (await check.check([], "allow")).facts

    def open(self, stack: contextlib.ExitStack, say: Callable[[str], None]) -> None:
        """Take the directory for as long as `stack` is open, and find out what is missing there.

        Raises:
            UserError: another plan, another writer, files that are damaged.
        """
        self.account = stack.enter_context(Account(self.directory, self.plan, self.keys()))
        if self.account.torn:
            say(f"{self.source.name}: {self.account.torn}")
        if self.account.is_finished():
            done = read_done(self.directory)
            if done["failed"] and self.config.retry_failed:
                return
            self.done = done
            say(f"{self.source.name}: complete, {done['rows']:,} answers; nothing to do")

    def there(self) -> int:
        """How many rows there are, from the files alone.

        Raises:
            UserError: another plan, or files that are damaged.
        """
        if not num_parts(self.directory):
            return 0
        check_plan(self.directory, self.plan)
        return int(np.isin(self.keys(), scan(self.directory).keys).sum())

    @property
    def needs_server(self) -> bool:
        """Whether anything is to be asked."""
        return self.done is None and self.account.missing().size > 0

    async def look(self, endpoints: list[Endpoint], say: Callable[[str], None]) -> None:
        """Preflight of every address.

        Raises:
            UserError: one line.
        """
        import aiohttp

        versions = set()
        async with aiohttp.ClientSession() as session:
            for endpoint in endpoints:
                check = Preflight(self.source, endpoint, session)
                for fact in await self.prove(check):
                    say(f"{self.source.name}: {endpoint.url}: {fact}")
                versions |= {check.version} if check.version is not None else set()
        self.plan = dataclasses.replace(self.plan, notes=dict(self.plan.notes) | {"server_versions": sorted(versions)})

    def stop(self) -> None:
        """Send nothing more; a server that starts is ended."""
        self._is_stopped = True
        if self.client is not None:
            self.client.stop()
        elif self._starting is not None:
            self._starting.cancel()

    async def ask(self, display: Display) -> None:
        """Have every answer that is missing, of servers that were looked at before, or of ours.

        Raises:
            UserError: servers or answers that fail. What came is kept.
        """
        if self.done is not None or self._is_stopped:
            return
        account, client = self.account, None
        if self.needs_server:
            try:
                endpoints = self.endpoints()
                if not endpoints:
                    self._starting = asyncio.create_task(self._start(display))
                    endpoints = await self._starting
                account.plan = self.plan
                account.begin()
                client = await self._ask(account, endpoints, display)
            except asyncio.CancelledError:
                if not self._is_stopped:
                    raise
                return
            finally:
                for server in self.servers:
                    await server.stop()
            if client.stopped and not (account.have | account.failed).all():
                return
        figures = await asyncio.to_thread(self.figures, account.rows())
        facts = {"source": self.source.name, "model": self.source.config.model, "figures": figures, "failures": {}}
        if client is not None:
            facts |= run_figures(client) | {"failures": dict(client.stats.failed)}
        self.done = await asyncio.to_thread(account.finish, facts)

    async def _start(self, display: Display) -> list[Endpoint]:
        count = self.source.config.server.replicas
        logs = (self.directory / f"server-{number}.log" for number in range(count))
        self.servers = [OwnServer(self.source.config, i, log, display.say) for i, log in enumerate(logs)]
        await asyncio.gather(*(server.start() for server in self.servers))
        most = self.source.config.max_in_flight
        endpoints = [Endpoint(server.url, most, self.headers, server) for server in self.servers]
        await self.look(endpoints, display.say)
        return endpoints

    def endpoints(self) -> list[Endpoint]:
        """The addresses that were given."""
        return [Endpoint(url, self.source.config.max_in_flight, self.headers) for url in self.source.config.url]

    async def _ask(self, account: Account, endpoints: list[Endpoint], display: Display) -> Client:
        def answered(job: Job, answer: dict[str, Any], how: dict[str, Any]) -> None:
            account.append(job.position, self.row(job, answer, how, display.say))

        def failed(job: Job, fault: Fault) -> None:
            why = {"kind": fault.name, "status": fault.status, "reason": fault.reason, "attempts": job.attempts}
            account.fail(job.position, {"prompt_id": job.prompt.id, "index": job.index, **why, "time": now()})

        self.client = client = Client(self.source, self.config, endpoints, answered, failed, display.say)
        there = int(account.have.sum())
        display.watch(Pace(self.name, len(account.keys), there, client))
        started = now()
        syncing = asyncio.create_task(_sync(account))
        try:
            await client.run(self.jobs(account), len(account.keys), there)
        finally:
            syncing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await syncing
            note = {"started": started, "ended": now(), **run_figures(client)}
            note["restarts"] = sum(server.restarts for server in self.servers)
            with open(self.directory / RUNS, "a", encoding="utf-8") as file:
                file.write(json.dumps(note) + "\n")
        return client


async def _sync(account: Account) -> None:
    while True:
        await asyncio.sleep(SYNC_S)
        await asyncio.to_thread(account.sync)


def run_figures(client: Client) -> dict[str, Any]:
    """What one run did, for runs.jsonl and done.json."""
    stats, seconds = client.stats, time.monotonic() - client.stats.started
    return {
        "seconds": round(seconds, 1),
        "answers": stats.answers,
        "tokens_per_second": round(stats.tokens / max(seconds, 1e-3), 1),
        "faults": dict(stats.faults),
        "max_in_flight_reached": sum(endpoint.limit for endpoint in client.endpoints),
    }


def _headers(config: SourceConfig) -> dict[str, str]:
    key = key_of_environment(f"source {config.name}: ", config.api_key_env)
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _told(config: SourceConfig) -> dict[str, Any]:
    """The source's whole section, as it was set."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
