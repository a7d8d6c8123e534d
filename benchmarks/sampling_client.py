"""What a request costs the client of `fuserl sample`: CPU, memory, and the time to go on after a stop.

A stub in a process of its own answers at once, so that the client is what is measured; beside it bare aiohttp, httpx
and the openai client where they are installed, in turns.

    python benchmarks/sampling_client.py --answers 1000000     # the figures of docs/performance.md
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_FLIGHT = 64
MESSAGES = [{"role": "user", "content": "hello " * 40}]
PROGRAM = """
import sys
from fuserl_megatron.config.sample_sections import SampleConfig, SourceConfig
from fuserl_megatron.making.sample import sample
prompts, output, n, url = sys.argv[1:]
sample(SampleConfig(prompts=(prompts,), output=output, n=int(n)), [SourceConfig(name="a", model="m", url=(url,))])
"""


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    """User and system time."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


async def with_aiohttp(url: str, count: int) -> None:
    """The floor: requests and parsed replies, nothing kept."""
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one() -> None:
            body = {"model": "m", "messages": MESSAGES, "max_tokens": 9}
            async with session.post(f"{url}/chat/completions", json=body) as reply:
                (await reply.json())["choices"][0]["finish_reason"]

        await in_turn(one, count)


async def with_httpx(url: str, count: int) -> None:
    """The same with httpx."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None) as client:

        async def one() -> None:
            body = {"model": "m", "messages": MESSAGES, "max_tokens": 9}
            (await client.post(f"{url}/chat/completions", json=body)).json()["choices"][0]["finish_reason"]

        await in_turn(one, count)


async def with_openai(url: str, count: int) -> None:
    """The same with the openai client."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=url, api_key="none")

    async def one() -> None:
        reply = await client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=9)
        reply.choices[0].finish_reason  # noqa: B018

    await in_turn(one, count)


async def in_turn(one, count: int) -> None:
    """`count` requests, IN_FLIGHT at one time."""
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            await one()

    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


def run_ours(url: str, directory: Path, answers: int, n: int) -> dict[str, float]:
    """`fuserl sample` in a process of its own: CPU and memory of all of it, start and end included."""
    prompts = directory / "prompts.jsonl"
    with open(prompts, "w") as file:
        for i in range(answers // n):
            file.write(json.dumps({"prompt": f"{i} " + MESSAGES[0]["content"]}) + "\n")
    command = [sys.executable, "-c", PROGRAM, str(prompts), str(directory / "out"), str(n), url]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    _, code, used = os.wait4(process.pid, 0)
    assert code == 0, code
    wall = time.monotonic() - started
    return {"cpu": used.ru_utime + used.ru_stime, "wall": wall, "rss": used.ru_maxrss / 1024}


def time_resume(directory: Path) -> float:
    """Seconds to read the keys of everything that is there."""
    from fuserl_megatron.making.parts import scan

    started = time.monotonic()
    scan(directory / "out" / "a")
    return time.monotonic() - started


def main() -> None:
    """Print one line for each client and round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=20_000, help="answers that `fuserl sample` has (default 20,000)")
    parser.add_argument("--requests", type=int, default=2_000, help="requests of each other client (default 2,000)")
    parser.add_argument("--n", type=int, default=5, help="answers to a prompt (default 5)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round of little")
    options = parser.parse_args()
    if options.quick:
        options.answers, options.requests, options.rounds = 1000, 200, 1
    from fuserl_megatron.util.ports import free_port

    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    server = subprocess.Popen([sys.executable, str(ROOT / "tests" / "stub_server.py"), str(port)])
    try:
        asyncio.run(wait_for(url))
        for number in range(options.rounds):
            for client in (with_aiohttp, with_httpx, with_openai):
                name = client.__name__.removeprefix("with_")
                try:
                    before, started = cpu_seconds(), time.monotonic()
                    asyncio.run(client(url, options.requests))
                except ImportError:
                    print(f"round {number}  {name:14} not installed")
                    continue
                cpu, wall = cpu_seconds() - before, time.monotonic() - started
                print(f"round {number}  {name:14} {1e3 * cpu / options.requests:6.3f} ms CPU a request, {wall:.1f} s")
            with tempfile.TemporaryDirectory() as folder:
                used = run_ours(url, Path(folder), options.answers, options.n)
                each = 1e3 * used["cpu"] / options.answers
                pace = options.answers / used["wall"]
                print(
                    f"round {number}  {'fuserl sample':14} {each:6.3f} ms CPU an answer with everything, "
                    f"{used['wall']:.1f} s ({pace:,.0f}/s), {used['rss']:.0f} MB at most, "
                    f"resume scan {time_resume(Path(folder)):.2f} s"
                )
    finally:
        server.kill()
        server.wait()


async def wait_for(url: str) -> None:
    """Until the stub answers."""
    import aiohttp

    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url.removesuffix("/v1") + "/health"):
                    return
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.1)


if __name__ == "__main__":
    main()
