"""Tokens a second of `fuserl sample` beside `vllm bench serve`: the same server, prompts of one kind, in turns.

Both keep the same number of requests in flight and draw alike (temperature, top_p, a fixed number of tokens). Prompts
differ from turn to turn, so that nothing is answered from the server's prefix cache. Beside the pace stand the tokens
of a step of the server's engine, which are as many as the requests it has at that moment: how full it was kept,
whatever else the machine does. (The 16 steps of the one probe before our first answer are left out.)

    python benchmarks/sampling_throughput.py --vllm .venv-vllm/bin/vllm --model models/smollm2

`vllm bench serve` reads prompts with pandas: `pip install pandas` in its environment. Without --vllm nothing is
measured: a server is needed that is not part of this project's environment.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPERATURE, TOP_P = 0.8, 0.95
READY_S = 1800
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def write_prompts(file: Path, turn: str, count: int) -> None:
    """Prompts of about the same length that no other turn has."""
    text = "Tell me in your own words what is special about"
    rows = [{"prompt": f"{text} the number {turn} {i:05d} and where it is used."} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(options: argparse.Namespace, url: str, folder: Path, prompts: Path, seeds: bool) -> float:
    """Tokens a second, as runs.jsonl has it."""
    source = folder / "bench.yaml"
    sampling = {"temperature": TEMPERATURE, "top_p": TOP_P, "max_tokens": options.tokens}
    sampling["extra_body"] = {"ignore_eos": True}
    settings = {"model": "bench", "url": [url], "max_in_flight": options.in_flight, "sampling": sampling}
    source.write_text(json.dumps(settings | {"send_seed": seeds}))  # JSON is yaml
    words = [f"prompts=[{prompts}]", f"output={folder / prompts.stem}", f"sources=[{source}]", "n=1"]
    command = [sys.executable, "-m", "fuserl_megatron.cli", "sample", *words]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    run = json.loads((folder / prompts.stem / "bench" / "runs.jsonl").read_text().splitlines()[-1])
    assert run["answers"] == options.requests, run
    return run["tokens_per_second"]


def theirs(options: argparse.Namespace, url: str, folder: Path, prompts: Path) -> float:
    """Tokens a second, as `vllm bench serve` counts them."""
    words = ["--backend", "openai-chat", "--base-url", url.removesuffix("/v1"), "--endpoint", "/v1/chat/completions"]
    words += ["--model", "bench", "--tokenizer", str(options.model), "--dataset-name", "custom"]
    words += ["--dataset-path", str(prompts), "--custom-output-len", str(options.tokens), "--skip-chat-template"]
    words += ["--num-prompts", str(options.requests), "--max-concurrency", str(options.in_flight), "--ignore-eos"]
    words += ["--temperature", str(TEMPERATURE), "--top-p", str(TOP_P), "--disable-shuffle"]
    words += ["--save-result", "--result-dir", str(folder), "--result-filename", f"{prompts.stem}.json"]
    done = subprocess.run(
        [options.vllm, "bench", "serve", *words], env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"vllm bench serve: {done.stderr[-2000:]}")
    result = json.loads((folder / f"{prompts.stem}.json").read_text())
    assert result["completed"] == options.requests, result["completed"]
    return result["output_throughput"]


def engine(url: str) -> tuple[float, float]:
    """(tokens made, steps) of the server's engine so far."""
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics", timeout=60) as reply:
        lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
    names = ("vllm:generation_tokens_total{", "vllm:iteration_tokens_total_count{")
    tokens, steps = (sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)) for name in names)
    return tokens, steps


def wait_for(process: subprocess.Popen, port: int, log: Path) -> None:
    """Until the server answers."""
    started = time.monotonic()
    while time.monotonic() - started < READY_S:
        if process.poll() is not None:
            raise SystemExit(f"vllm serve ended: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"vllm serve does not answer after {READY_S} s")


def main() -> None:
    """Print a line for each turn, and the median of the turns' ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="the program (make test-vllm installs one)")
    parser.add_argument("--model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="one turn of little")
    options = parser.parse_args()
    if options.vllm is None or options.model is None:
        print("sampling_throughput: nothing measured; give --vllm and --model")
        return
    if options.quick:
        options.turns, options.requests = 1, 16
    options.vllm = shutil.which(options.vllm) or options.vllm
    from fuserl_megatron.making.preflight import PROBE_TOKENS
    from fuserl_megatron.util.ports import free_port

    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [
            "serve",
            str(options.model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--served-model-name",
            "bench",
        ]
        words += ["--served-model-name", "bench", "--max-model-len", "1024", "--enforce-eager"]
        words += ["--max-num-seqs", str(options.in_flight)]
        with open(folder / "vllm.log", "wb") as log:
            server = subprocess.Popen([options.vllm, *words], stdout=log, stderr=log, env=os.environ | ENVIRONMENT)
        try:
            wait_for(server, port, folder / "vllm.log")
            paces: dict[str, list[float]] = {"with seeds": [], "without seeds": []}
            fills: dict[str, list[float]] = {name: [] for name in (*paces, "bench")}
            for turn in range(options.turns):
                found = {}
                arms = ["with seeds", "bench", "without seeds"]
                for arm in arms if turn % 2 == 0 else reversed(arms):  # who comes first takes turns, too
                    prompts = folder / f"{arm.replace(' ', '_')}_{turn}.jsonl"
                    write_prompts(prompts, f"{turn}{len(arm)}", options.requests)
                    tokens, steps = engine(url)
                    if arm == "bench":
                        found[arm] = theirs(options, url, folder, prompts)
                    else:
                        found[arm] = ours(options, url, folder, prompts, arm == "with seeds")
                    probe = 0 if arm == "bench" else PROBE_TOKENS
                    after = engine(url)
                    fills[arm].append((after[0] - tokens - probe) / (after[1] - steps - probe))
                for arm in paces:
                    paces[arm].append(found[arm] / found["bench"])
                words = [f"{arm} {pace:.1f} ({fills[arm][-1]:.2f} a step)" for arm, pace in found.items()]
                print(f"turn {turn}: tokens/s: {', '.join(words)}; load {os.getloadavg()[0]:.1f}", flush=True)
            for arm in paces:
                pace, full = statistics.median(paces[arm]), statistics.median(fills[arm])
                ratio = full / statistics.median(fills["bench"])
                print(f"fuserl sample {arm} / vllm bench serve, medians: pace {pace:.3f}, tokens a step {ratio:.3f}")
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
