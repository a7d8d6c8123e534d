"""Servers that `fuserl sample` starts itself: from the command to the first sign of health, watched, ended with us."""

import asyncio
import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fuserl_megatron.config.sample_sections import ServerConfig, SourceConfig
from fuserl_megatron.util.credentials import redact
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.ports import free_port
from fuserl_megatron.util.text import printable

POLL_S = 0.25
PAUSE_S = 5.0
"""Before the second restart; the first comes at once, the third after twice as long."""
END_S = 20.0
"""Seconds a server is given to end before it is killed."""
TAIL_BYTES = 8000


class OwnServer:
    """One server process with its group.

    Attributes:
        url: its address with /v1; another one after a restart.
        restarts: how often it was started again.
    """

    def __init__(self, config: SourceConfig, number: int, log: Path, say: Callable[[str], None]):
        self.config, self.settings, self.number, self.log, self.say = config, config.server, number, log, say
        self.url, self.restarts = "http://127.0.0.1:0/v1", 0
        self._process: subprocess.Popen | None = None

    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Start it and wait until it answers. Called in the main thread: the kernel ends it with the one that calls.

        Raises:
            UserError: it ended, or it does not answer in time; with the last line of its log.
        """
        port = free_port()
        words = command_of(self.config, port)
        self.url = f"http://127.0.0.1:{port}/v1"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            log.write(f"\n--- {shlex.join(words)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.settings, self.number),
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self.say(f"{self.config.name}: starting {shlex.join(words)} (its log: {self.log})")
        started = time.monotonic()
        while not await self._answers():
            code = self._process.poll()
            if code is not None:
                raise UserError(f"{self.config.name}: {words[0]} ended with code {code}: {self._last_line()}")
            if time.monotonic() - started > self.settings.ready_seconds:
                limit = f"server.ready_seconds={self.settings.ready_seconds:g}"
                raise UserError(f"{self.config.name}: {words[0]} does not answer after {limit}: {self._last_line()}")
            await asyncio.sleep(POLL_S)
        self.say(f"{self.config.name}: answers at {self.url} after {time.monotonic() - started:.0f} s")

    async def restart(self) -> None:
        """End what is left of it and start it again.

        Raises:
            UserError: it was restarted too often, or as of `start`.
        """
        if self.restarts >= self.settings.max_restarts:
            limit = f"server.max_restarts={self.settings.max_restarts}"
            raise UserError(f"{self.config.name}: its server died again after {limit}: {self._last_line()}")
        await self.stop()
        await asyncio.sleep(PAUSE_S * self.restarts)
        self.restarts += 1
        await self.start()

    async def stop(self) -> None:
        """End the whole process group: asked first, killed then."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + END_S
        while process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):  # also what a leader that ended has left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    async def _answers(self) -> bool:
        import aiohttp

        try:
            timeout = aiohttp.ClientTimeout(total=10)
            async with aiohttp.ClientSession(timeout=timeout) as session:
                async with session.get(f"{self.url.removesuffix('/v1')}/health") as response:
                    return response.status < 500
        except (aiohttp.ClientError, OSError):
            return False

    def _last_line(self) -> str:
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines
        return redact(printable((errors or ["it wrote nothing"])[-1][:300])) + f"; see {self.log}"


def check_program(config: SourceConfig) -> None:
    """Raises UserError where the program that starts a server is not there."""
    program = command_of(config, 0)[0]
    if shutil.which(program) is None:
        raise UserError(f"{config.name}: {program} is not on PATH; install it, or give the url of a server that runs")


def command_of(config: SourceConfig, port: int) -> list[str]:
    """The words of the command that starts a server."""
    filled = {"model": config.model, "name": config.model, "port": str(port)}
    words = []
    for word in shlex.split(config.server.command):
        for name, value in filled.items():
            word = word.replace("{" + name + "}", value)
        words.append(word)
    if config.revision is not None:
        words += ["--revision", config.revision]
    for name, value in config.server.args.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not False and value is not None:
            words += [option, str(value)]
    return words


def environment(settings: ServerConfig, number: int, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Of replica `number`: with several replicas each sees its part of the GPUs.

    Raises:
        UserError: the GPUs cannot be shared out evenly.
    """
    found = dict(environ)
    if settings.replicas > 1 and (gpus := visible_gpus(environ)):
        if len(gpus) % settings.replicas:
            raise UserError(
                f"server.replicas={settings.replicas}: {len(gpus)} GPUs cannot be shared out evenly; take a divisor"
            )
        each = len(gpus) // settings.replicas
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number * each : (number + 1) * each])
    return found


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the GPUs this process may use, as CUDA_VISIBLE_DEVICES has them."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    with contextlib.suppress(OSError):
        return [str(number) for number in range(len(os.listdir("/proc/driver/nvidia/gpus")))]
    return []


def _end_with_parent() -> None:
    """In the child, before it becomes its program: Linux ends it when we are killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
