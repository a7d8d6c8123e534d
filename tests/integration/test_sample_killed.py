"""5,000 answers of a server that goes wrong, with the client killed at random instants: as if nothing had happened."""

import hashlib
import json
import random
import subprocess
import sys
import time

import pytest
from stub_server import Stub

from fuserl_megatron.config.sample_sections import SampleConfig, SourceConfig
from fuserl_megatron.making.finished import finished_rows
from fuserl_megatron.making.sample import sample

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


def run_killed(num_prompts, n, num_kills, tmp_path, seed=0):
    chance = random.Random(seed)
    prompts, output = tmp_path / "p.jsonl", tmp_path / "killed"
    prompts.write_text("".join(json.dumps({"prompt": f"q {i}", "meta": i}) + "\n" for i in range(num_prompts)))
    expected, directory = num_prompts * n, output / "a"
    with Stub(seed=seed).running() as stub:
        config = SampleConfig(prompts=(str(prompts),), output=str(tmp_path / "undisturbed"), n=n)
        sample(config, [SourceConfig(name="a", model="m", url=(stub.url,))])
        stub.share = 0.02
        command = [sys.executable, "-c", PROGRAM, str(prompts), str(output), str(n), stub.url]
        for kill in range(num_kills):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            until = num_lines(directory) + chance.randint(1, 2 * expected // (num_kills + 2) // 2)
            while num_lines(directory) < until and process.poll() is None:
                time.sleep(chance.random() * 0.02)
            process.kill()
            process.wait()
            if kill == num_kills // 2:
                part = max(directory.glob("part-*.jsonl"))
                part.write_bytes(part.read_bytes()[: -chance.randint(2, 200)])
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        assert done.returncode == 0
    disturbed, keys = content(directory)
    undisturbed, expected_keys = content(tmp_path / "undisturbed" / "a")
    assert len(keys) == len(set(keys)) == num_lines(directory) == expected
    assert keys == expected_keys and disturbed == undisturbed
    return stub


def test_killed_five_times(tmp_path):
    stub = run_killed(1000, 5, 5, tmp_path)
    assert all(stub.counts[kind] for kind in ("429", "500", "503", "reset", "slow", "half", "html"))


@pytest.mark.slow
def test_a_million_killed_twenty_times(tmp_path):
    run_killed(200_000, 5, 20, tmp_path)
