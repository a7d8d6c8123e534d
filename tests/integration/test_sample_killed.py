"""5,000 answers of a server that goes wrong, with the client killed at random instants: as if nothing had happened."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time

import pytest
from stub_server import Stub

from fuserl_megatron.making.finished import finished_rows
from fuserl_megatron.making.parts import scan

PROGRAM = """
import sys
from fuserl_megatron.config.sample_sections import SampleConfig, SourceConfig
from fuserl_megatron.making.sample import sample
prompts, output, n, url = sys.argv[1:]
source = SourceConfig(name="a", model="m", url=(url,))
sys.exit(sample(SampleConfig(prompts=(prompts,), output=output, n=int(n), max_attempts=20), [source]))
"""


def content(directory):
    """Order-independent hash of the rows without what tells of time and attempts."""
    digest, keys = 0, []
    for row in finished_rows(directory):
        keys.append(row["key"])
        own = [row[name] for name in ("key", "prompt", "index", "response", "finish_reason", "seed", "meta")]
        digest ^= int.from_bytes(hashlib.sha256(json.dumps(own).encode()).digest()[:8], "big")
    return digest, keys


def num_lines(directory):
    return sum(file.read_bytes().count(b"\n") for file in directory.glob("part-*.jsonl"))


def num_bytes(directory):
    return sum(file.stat().st_size for file in directory.glob("part-*.jsonl"))


def run_killed(num_prompts, n, num_kills, tmp_path, seed=0):
    """Returns the stub, and the most memory in MB that a run of the client took."""
    chance = random.Random(seed)
    prompts, output, undisturbed = tmp_path / "p.jsonl", tmp_path / "killed", tmp_path / "undisturbed"
    prompts.write_text("".join(json.dumps({"prompt": f"q {i}", "meta": i}) + "\n" for i in range(num_prompts)))
    expected, directory = num_prompts * n, output / "a"

    def start(output):
        command = [sys.executable, "-c", PROGRAM, str(prompts), str(output), str(n), stub.url]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    with Stub(seed=seed).running() as stub:
        _, code, used = os.wait4(start(undisturbed).pid, 0)
        assert code == 0
        most = used.ru_maxrss
        whole = num_bytes(undisturbed / "a")
        stub.share = 0.02
        for kill in range(num_kills):
            process = start(output)
            until = num_bytes(directory) + chance.randint(1, whole // (num_kills + 2))
            while num_bytes(directory) < until and process.poll() is None:
                time.sleep(chance.random() * 0.02)
            process.kill()
            process.wait()
            if kill == num_kills // 2:
                part = max(directory.glob("part-*.jsonl"))
                os.truncate(part, part.stat().st_size - chance.randint(2, 200))
        _, code, used = os.wait4(start(output).pid, 0)
        assert code == 0
    disturbed, keys = content(directory)
    expected_hash, expected_keys = content(undisturbed / "a")
    assert len(keys) == len(set(keys)) == num_lines(directory) == expected
    assert keys == expected_keys and disturbed == expected_hash
    return stub, max(most, used.ru_maxrss) / 1024


def test_killed_five_times(tmp_path):
    stub, _ = run_killed(1000, 5, 5, tmp_path)
    assert all(stub.counts[kind] for kind in ("429", "500", "503", "reset", "slow", "half", "html"))


@pytest.mark.slow
def test_a_million_killed_twenty_times(tmp_path):
    num_prompts = int(os.environ.get("FUSERL_KILLED_PROMPTS", "200000"))
    started = time.monotonic()
    stub, most = run_killed(num_prompts, 5, 20, tmp_path)
    assert most < 300
    before = time.monotonic()
    scan(tmp_path / "killed" / "a")
    seconds = time.monotonic() - before
    took = f"{5 * num_prompts:,} answers twice in {before - started:.0f} s, {most:.0f} MB at most"
    print(f"{took}, resume scan {seconds:.1f} s, faults {dict(stub.counts)}")
    assert seconds < 10
