"""One address that answers: how many requests it gets at one time, its pauses, and whether it is alive."""

import asyncio
import random
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuserl_megatron.making.servers import OwnServer

START = 64
"""Requests in flight at the beginning."""
PERIOD_S = 1.0
"""Shortest time over which tokens a second are measured."""
BETTER = 1.05
"""A larger number in flight must bring so much more."""
PATIENT_PERIODS = 10
"""After so many periods without a rise the measure is taken anew: answers may have become shorter or longer."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 30.0
POLL_S = 1.0
LONGEST_POLL_S = 15.0
HEALTH_TIMEOUT_S = 10.0
FRESH_S = 0.5
"""Many requests fail together: one of them asks for the server's health."""


class Endpoint:
    """One server, by its address (with /v1)."""

    def __init__(self, url: str, most: int, headers: Mapping[str, str], server: "OwnServer | None" = None):
        self.url, self.most, self.headers, self.server = url.rstrip("/"), most, headers, server
        self.limit = min(START, most)
        self.in_flight, self.is_down = 0, False
        self.root = self.url.removesuffix("/v1")
        self._paused_until = 0.0
        self._busy_in_a_row = 0
        self._halved_at, self._ceiling = 0.0, float("inf")
        self._best, self._stale = 0.0, 0
        self._since, self._tokens, self._answers, self._fullest = time.monotonic(), 0, 0, 0
        self._health_lock, self._health = asyncio.Lock(), (-1.0, True)

    @property
    def how_to_revive(self) -> str:
        """What is done when it is down, in words."""
        return "waiting for it" if self.server is None else "starting it again"

    def without_key(self, text: str) -> str:
        """A text of the server's, which may repeat the key it was sent."""
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return text.replace(key, "(the key)") if key else text

    def is_open(self, moment: float) -> bool:
        """Whether it may be asked now."""
        return not self.is_down and moment >= self._paused_until

    def answered(self, tokens: int) -> None:
        """An answer came."""
        self._tokens += tokens
        self._answers += 1
        self._busy_in_a_row = 0
        self._fullest = max(self._fullest, self.in_flight)

    def busy(self, wait: float | None) -> None:
        """It refused a request because it has too much to do: halve, and leave it alone for a while."""
        moment = time.monotonic()
        if moment >= self._paused_until:  # one step for all requests that were refused together
            self._busy_in_a_row += 1
            pause = min(FIRST_PAUSE_S * 2 ** (self._busy_in_a_row - 1), LONGEST_PAUSE_S) * (0.5 + random.random())
            self._paused_until = moment + (pause if wait is None else wait)
        if moment - self._halved_at > PERIOD_S:
            self.limit = self._ceiling = max(1, self.limit // 2)
            self._halved_at, self._best = moment, 0.0
            self._begin_period(moment)

    def adapt(self, moment: float) -> bool:
        """Raise the limit while that brings more tokens a second; returns whether it was raised."""
        elapsed = moment - self._since
        if elapsed < PERIOD_S or self._answers < self.limit:
            return False
        rate, full = self._tokens / elapsed, self._fullest >= 0.9 * self.limit
        self._begin_period(moment)
        if not full or self.limit >= self.most:
            return False
        if rate <= self._best * BETTER:
            self._stale += 1
            if self._stale >= PATIENT_PERIODS:
                self._best, self._stale = 0.0, 0
            return False
        self._best, self._stale = rate, 0
        step = self.limit // 2 if self.limit < self._ceiling else 4  # carefully where it was too much before
        self.limit = min(self.most, self.limit + max(step, 1))
        return True

    async def is_alive(self, session: Any) -> bool:
        """Whether the server's health is good just now: a 500 may mean a dead engine, or one bad moment."""
        async with self._health_lock:
            if time.monotonic() - self._health[0] > FRESH_S:
                self._health = (time.monotonic(), await self._ask_health(session))
            return self._health[1] and not self.is_down

    async def revive(self, session: Any) -> None:
        """Start our server again, or wait until theirs is there.

        Raises:
            UserError: ours has died too often, or does not start.
        """
        if self.server is not None:
            await self.server.restart()
            self.url = self.server.url
            self.root = self.url.removesuffix("/v1")
        else:
            wait = POLL_S
            while not await self._ask_health(session):
                await asyncio.sleep(wait)
                wait = min(wait * 1.5, LONGEST_POLL_S)
        self.is_down = False
        self._begin_period(time.monotonic())

    async def _ask_health(self, session: Any) -> bool:
        import aiohttp

        if self.server is not None and not self.server.is_running():
            return False
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
            async with session.get(f"{self.root}/health", timeout=timeout) as response:
                return response.status not in (502, 503, 504)  # not every server has the page
        except (aiohttp.ClientError, OSError):
            return False

    def _begin_period(self, moment: float) -> None:
        self._since, self._tokens, self._answers, self._fullest = moment, 0, 0, 0
