"""Many requests at once to one source's servers: how many, what is tried again, when to give up.

A fixed crew of workers for each address takes jobs from a lazy iterator; those above the address's present limit rest.
Nothing is queued but what is in flight or waits to be tried again: a million answers take the memory of a few hundred.
"""

import asyncio
import contextlib
import dataclasses
import heapq
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fuserl_megatron.config.sample_sections import AskConfig
from fuserl_megatron.making.accounting import now
from fuserl_megatron.making.endpoint import Endpoint
from fuserl_megatron.making.faults import Fault, alike, fault_of_error, fault_of_status
from fuserl_megatron.making.prompts import Prompt
from fuserl_megatron.making.sources import BadReply, Refused, Source
from fuserl_megatron.util.errors import UserError

TICK_S = 0.1
BACK_OFF_S = 0.5
"""Before the second attempt; twice as long before each further one, and between half and one and a half of that."""
FIRST_ALIKE = 20
"""A run whose first requests all fail for the same reason stops."""
FREE_FAILURES = 10
"""So many answers may fail whatever their share, unless max_failures is 0."""


@dataclass(slots=True)
class Job:
    """One answer to be had."""

    position: int
    """Of its key among the expected ones."""
    prompt: Prompt
    index: int = 0
    seed: int | None = None
    response: str = ""
    """The finished answer that is asked about, where it is not an answer that is asked for."""
    attempts: int = 0
    """Requests that failed through no fault of a busy or dead server."""
    deaths: int = 0
    """How many times the server died with this request under way."""


@dataclass
class Stats:
    """What came so far, in this run."""

    answers: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cut: int = 0
    """Answers that reached the limit of tokens."""
    faults: Counter[str] = field(default_factory=Counter)
    """Requests without an answer, by kind; most are tried again."""
    failed: Counter[str] = field(default_factory=Counter)
    """Answers that were given up, by kind."""
    started: float = field(default_factory=time.monotonic)


class _GraceIsOver(Exception): ...


class Client:
    """Asks one source for all jobs.

    Attributes:
        stats: what came so far.
        stopped: whether `stop` was called.
    """

    def __init__(
        self,
        source: Source,
        run: AskConfig,
        endpoints: list[Endpoint],
        on_answer: Callable[[Job, dict[str, Any], dict[str, Any]], None],
        on_failure: Callable[[Job, Fault], None],
        say: Callable[[str], None] = print,
    ):
        """on_answer gets the job, what the server said, and how it was asked; on_failure what was given up."""
        self.source, self.run_settings, self.endpoints = source, run, endpoints
        self.on_answer, self.on_failure, self.say = on_answer, on_failure, say
        self.stats, self.stopped = Stats(), False
        self._retries: list[tuple[float, int, Job]] = []
        self._order = itertools.count()
        self._first: list[str] = []
        self._troubled: tuple[float, str] | None = None
        self._stop_at = float("inf")
        self._over = False
        self._revivals: set[asyncio.Task] = set()

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return sum(endpoint.in_flight for endpoint in self.endpoints)

    @property
    def waiting(self) -> int:
        """Jobs that wait to be tried again."""
        return len(self._retries)

    def stop(self) -> None:
        """Send nothing more; requests under way may end within the grace."""
        self.stopped = True
        self._stop_at = time.monotonic() + self.run_settings.grace
        self._pulse()

    async def run(self, jobs: Iterator[Job], expected: int, there: int = 0) -> None:
        """Until every job has an answer or was given up, or `stop` was called and the grace is over.

        Args:
            jobs: read as they are needed.
            expected: all answers of the source, of which max_failures is a share.
            there: how many of them earlier runs have brought.

        Raises:
            UserError: all of the first requests failed alike, too many failed, the key is refused, no server for too
                long, or a server of ours died too often. What came is written.
        """
        import aiohttp

        self._jobs, self._num_expected, self._num_there = jobs, expected, there
        self._changed = asyncio.Event()
        timeout = aiohttp.ClientTimeout(total=self.source.config.timeout, sock_connect=30)
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._session:
            workers = [self._work(end, number) for end in self.endpoints for number in range(end.most)]
            tasks = [asyncio.create_task(work) for work in [*workers, self._tick()]]
            try:
                await asyncio.gather(*tasks)
            except _GraceIsOver:
                pass
            finally:
                for task in [*tasks, *self._revivals]:
                    task.cancel()
                await asyncio.gather(*tasks, *self._revivals, return_exceptions=True)
        if self._over and not (there or self.stats.answers) and self._first:
            raise UserError(f"{self.source.name}: no request brought an answer: {self._first[0]}")

    async def _work(self, endpoint: Endpoint, number: int) -> None:
        while not self.stopped and not self._over:
            if number >= endpoint.limit or not endpoint.is_open(time.monotonic()):
                await self._changed.wait()
            elif (job := self._next()) is not None:
                endpoint.in_flight += 1
                try:
                    await self._ask(job, endpoint)
                finally:
                    endpoint.in_flight -= 1
            elif not self._retries and not self.in_flight:
                self._over = True
                self._pulse()
            else:
                await self._changed.wait()

    def _next(self) -> Job | None:
        if self._retries and self._retries[0][0] <= time.monotonic():
            return heapq.heappop(self._retries)[2]
        return next(self._jobs, None)

    async def _ask(self, job: Job, endpoint: Endpoint) -> None:
        import aiohttp

        async def post(path: str, body: dict[str, Any], at_root: bool = False) -> Any:
            data = json.dumps(body, ensure_ascii=False).encode()
            url = (endpoint.root if at_root else endpoint.url) + path
            async with self._session.post(url, data=data, headers=endpoint.headers) as response:
                content = await response.read()
                if response.status != 200:
                    raise Refused(fault_of_status(response.status, response.headers, content))
                return json.loads(content)

        started = time.monotonic()
        try:
            answer = await self.source.ask(job, post)
        except Refused as refused:
            fault = refused.fault
        except BadReply as bad:
            fault = Fault("broken", str(bad), "bad_reply")
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            fault = fault_of_error(error)
        else:
            return self._answered(job, endpoint, answer, time.monotonic() - started)
        await self._faulted(job, endpoint, fault)

    def _answered(self, job: Job, endpoint: Endpoint, answer: dict[str, Any], seconds: float) -> None:
        how = {"seed": job.seed, "server": endpoint.url, "seconds": round(seconds, 3), "attempt": job.attempts + 1}
        self.on_answer(job, answer, how | {"time": now()})
        tokens = answer["tokens"] or 0
        self.stats.answers += 1
        self.stats.tokens += tokens
        self.stats.prompt_tokens += answer["prompt_tokens"] or 0
        self.stats.cut += answer["finish_reason"] == "length"
        self._troubled = None
        endpoint.answered(tokens or 1)

    async def _faulted(self, job: Job, endpoint: Endpoint, fault: Fault) -> None:
        """Decide between busy, dead, tried again and given up."""
        fault = dataclasses.replace(fault, reason=endpoint.without_key(fault.reason))
        self.stats.faults[fault.name] += 1
        if fault.kind == "stop":
            raise UserError(f"{self.source.name}: {endpoint.url}: {fault.reason}; see api_key_env")
        if fault.kind == "busy":
            endpoint.busy(fault.wait)
            self._trouble(fault, endpoint)
            return self._again(job, 0.0)
        if fault.kind == "lost" or (fault.kind == "broken" and not await endpoint.is_alive(self._session)):
            if fault.kind == "broken":
                job.deaths += 1
            self._trouble(fault, endpoint)
            self._revive(endpoint, fault)
            if job.deaths < self.run_settings.max_attempts:
                return self._again(job, 0.0)
            fault = Fault("broken", f"the server died {job.deaths} times with it ({fault.reason})", "deadly")
        job.attempts += 1
        self._remember(fault)
        if fault.kind == "permanent" or fault.name == "deadly" or job.attempts >= self.run_settings.max_attempts:
            return self._give_up(job, fault)
        self._again(job, BACK_OFF_S * 2 ** (job.attempts - 1) * (0.5 + random.random()))

    def _again(self, job: Job, wait: float) -> None:
        heapq.heappush(self._retries, (time.monotonic() + wait, next(self._order), job))

    def _remember(self, fault: Fault) -> None:
        """Stop when the first requests all failed alike: the rest of a million would, too."""
        left_for_last = self._num_there and fault.name == "prompt_too_long"  # all that remained may be such ones
        if self.stats.answers or left_for_last or len(self._first) >= FIRST_ALIKE:
            return
        self._first.append(fault.reason)
        if len(self._first) == FIRST_ALIKE and len({alike(reason) for reason in self._first}) == 1:
            raise UserError(f"{self.source.name}: the first {FIRST_ALIKE} requests all failed alike: {fault.reason}")

    def _give_up(self, job: Job, fault: Fault) -> None:
        self.stats.failed[fault.name] += 1
        self.on_failure(job, fault)
        if not (self.stats.answers or self._num_there) and len(self._first) < FIRST_ALIKE:
            return  # too early for a share; if all of the first ones fail, `_remember` knows more to say
        share, failed = self.run_settings.max_failures, self.stats.failed.total()
        if failed > max(share * self._num_expected, FREE_FAILURES if share else 0):
            kinds = ", ".join(f"{count} {name}" for name, count in self.stats.failed.most_common(3))
            what = f"{failed} answers failed ({kinds}), more than max_failures={share:g} allows"
            raise UserError(f"{self.source.name}: {what}; the last: {fault.reason}")

    def _trouble(self, fault: Fault, endpoint: Endpoint) -> None:
        self._troubled = self._troubled or (time.monotonic(), "")
        self._troubled = (self._troubled[0], f"{endpoint.url}: {fault.reason}")

    def _revive(self, endpoint: Endpoint, fault: Fault) -> None:
        """Wait in the background until the server answers again, or start ours anew."""
        if endpoint.is_down:
            return
        endpoint.is_down = True
        self.say(f"{self.source.name}: {endpoint.url} does not answer ({fault.reason}); {endpoint.how_to_revive}")

        async def revive() -> None:
            await endpoint.revive(self._session)
            self.say(f"{self.source.name}: {endpoint.url} answers again")
            self._pulse()

        self._revivals.add(asyncio.create_task(revive()))

    async def _tick(self) -> None:
        """Ten times a second: limits, ends of pauses, and whether it is time to stop."""
        paused: set[int] = set()
        while not self._over:
            moment = time.monotonic()
            if self.stopped and (not self.in_flight or moment > self._stop_at):
                raise _GraceIsOver
            for task in [task for task in self._revivals if task.done()]:
                self._revivals.remove(task)
                task.result()
            if self._troubled and moment - self._troubled[0] > self.run_settings.patience and self._are_theirs():
                waited = f"no answer for {self.run_settings.patience:g} s (patience)"
                raise UserError(f"{self.source.name}: {waited}: {self._troubled[1]}")
            closed = {i for i, endpoint in enumerate(self.endpoints) if not endpoint.is_open(moment)}
            risen = [endpoint.adapt(moment) for endpoint in self.endpoints]
            ready = self._retries and self._retries[0][0] <= moment
            if any(risen) or ready or paused - closed or not (self.in_flight or self._retries):
                self._pulse()
            paused = closed
            await asyncio.sleep(TICK_S)

    def _are_theirs(self) -> bool:
        return all(endpoint.server is None for endpoint in self.endpoints)

    def _pulse(self) -> None:
        """Wake every worker that rests, to look again."""
        with contextlib.suppress(AttributeError):  # not running yet
            self._changed.set()
            self._changed = asyncio.Event()
