"""Files of scored responses with something wrong in them, through `fuserl build` in this process.

Values of every field x odd values, bytes flipped, lines cut, keys added and doubled, as JSONL, gzip and parquet, under
on_bad_record=stop and skip. Right is: a data set that opens and whose counts add up, or one line and nothing left.
"""

import contextlib
import gzip
import io
import json
import os
import random
import tempfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from common import Report, Wrong, attempt, for_a_while, main

from fuserl_megatron import cli
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.testing.tiny import save_char_tokenizer
from fuserl_megatron.util.errors import UserError

TEXTS = [
    *("", " ", "\n", "a", "abc" * 50, "x" * 5000, "[/x] {y} 100%", "\x1b]0;t\x07", "\u202e", "\ud800", "\0"),
    *("é中\u200d", "<|im_end|>", "{{ 1 }}", "{% for %}", "</think>", "null", "NaN", "-0", "../../etc/passwd"),
    *("a\r\nb", "\ufeff"),
]  # fmt: skip
NUMBERS = [0, -1, 1, 0.5, 1e308, 1.7e308, -1.7e308, 5e-324, 2**63, 10**400, float("nan"), float("inf"), True, None]
MESSAGES = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "assistant", "content": "b"}],
    [{"role": "tool", "content": "x", "tool_call_id": "1"}],
    [{"role": "user", "content": [{"type": "text", "text": "part"}]}],
    [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
    [{}],
    [[]],
    [None],
    [],
]
OTHERS = [[], {}, [1], {"a": 1}, [[[[]]]], {"text": "x"}]
KEYS = ["prompt", "source", "response", "reward", "meta", "tools", "source_mean_logps", "other"]
KEYS += ["x\ud800", "\x1b[31m", "Reward", ""]
RAW = [b"[" * 9000, b'{"a":' * 900, b"7" * 5000, b"\xff", b"{}", b""]
SAFE = ("Cc", "Cs")


def value(rng: random.Random):
    """Anything that JSON can say."""
    return rng.choice(rng.choice([TEXTS, NUMBERS, MESSAGES, OTHERS]))


def record(rng: random.Random) -> dict:
    """A good record, or one with something odd in a field or two."""
    good = {
        "prompt": rng.choice(["p", "q", "what?", rng.choice(MESSAGES[:3])]),
        "source": rng.choice("abc"),
        "response": rng.choice(["yes", "no", f"answer {rng.randrange(99)}"]),
        "reward": rng.random(),
        "other": rng.random(),
    }
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        key = rng.choice(KEYS)
        if rng.random() < 0.2:
            good.pop(key, None)
        else:
            good[key] = value(rng)
    return good


def lines(rng: random.Random, records: list[dict]) -> bytes:
    """JSONL, now and then with its bytes damaged."""
    texts = [json.dumps(r, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass") for r in records]
    if rng.random() < 0.1:
        texts.insert(rng.randrange(len(texts)), rng.choice(RAW))
    if rng.random() < 0.1:
        texts[0] = texts[0][:-1] + b', "reward": ' + b"9" * 5000 + b"}"
    whole = bytearray(rng.choice([b"\n", b"\r\n"]).join(texts))
    for _ in range(rng.choice([0, 0, 0, 1, 5])):
        whole[rng.randrange(len(whole))] = rng.randrange(256)
    return bytes(whole[: rng.randrange(len(whole)) if rng.random() < 0.05 else None])


def write(rng: random.Random, folder: Path) -> Path:
    """One input file; a parquet file has only values that fit its columns, and its bytes damaged instead."""
    kind, records = rng.choice(["jsonl", "jsonl", "jsonl", "jsonl.gz", "parquet"]), [record(rng) for _ in range(12)]
    file = folder / f"in.{kind}"
    if kind == "parquet":
        good = [r for r in records if isinstance(r.get("prompt"), str) and isinstance(r.get("reward"), float)]
        rows = [{k: r[k] for k in KEYS[:4] if isinstance(r.get(k), str | float)} for r in good]
        with contextlib.suppress(pa.ArrowException, UnicodeEncodeError, TypeError):
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
        content = bytearray(file.read_bytes() if file.exists() else b"")
        for _ in range(rng.choice([0, 1, 1, 5, 20]) if content else 0):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content)
    else:
        content = lines(rng, records)
        file.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
        if kind.endswith("gz") and rng.random() < 0.2:
            file.write_bytes(file.read_bytes()[: -rng.randrange(1, 20)])
    return file


def check(code: int, said: str, complaint: str, folder: Path) -> None:
    """What must hold after every build."""
    unsafe = {c for c in said + complaint if c != "\n" and unicodedata.category(c) in SAFE}
    if unsafe:
        raise Wrong(f"control characters were printed: {sorted(map(ascii, unsafe))}")
    left = {path.name for path in folder.iterdir() if "in." not in path.name} - {"fused", "tokenizer"}
    if left:
        raise Wrong(f"left over: {left}")
    if code == 2:
        if complaint.count("\n") != 1 or (folder / "fused").exists():
            raise Wrong(f"not one line, or a data set all the same: {complaint}")
        raise UserError(complaint.strip())
    if code:
        raise RuntimeError(complaint)
    counts = FusedDataset(folder / "fused").manifest
    c, kept = counts.counts, counts.num_responses
    if kept + c["duplicate_records"] + c["rejected_records"] + c["filtered_by_source"] != c["records"]:
        raise Wrong(f"counts do not add up: {kept} kept, {c}")


def temperature(rng: random.Random, folder: Path) -> list[str]:
    """A number, or auto with one of the three ways to an accuracy; the labelled pairs may be as odd as the records."""
    pairs = [{"chosen_reward": rng.random() + 0.3, "rejected_reward": rng.random()} for _ in range(9)]
    if rng.random() < 0.7:
        rng.choice(pairs)[rng.choice(["chosen_reward", "rejected_reward", *KEYS])] = value(rng)
    (folder / "in.pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    ways = [f"calibration={folder}/in.pairs.jsonl", "second_reward=other", "reward_accuracy=0.8"]
    return rng.choice([["reward_temperature=0.1"], ["reward_temperature=auto", rng.choice(ways)]])


def run(seed: int, seconds: float, cases: int | None = None) -> Report:
    """Build until the time or the cases are over."""
    report = Report("records", seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_char_tokenizer(folder / "tokenizer")
        for number, rng in enumerate(for_a_while(seconds, cases, seed)):
            for path in folder.glob("in.*"):
                path.unlink()
            if (folder / "fused").exists():
                os.rename(folder / "fused", folder / "in.old")
            file = write(rng, folder)
            words = [f"inputs=[{file}]", f"output={folder}/fused", f"tokenizer={folder}/tokenizer"]
            words += [*temperature(rng, folder), f"on_bad_record={rng.choice(['stop', 'skip', 'skip'])}"]
            words += [f"max_length={rng.choice([16, 2048])}"]

            def case(words: list[str] = words) -> None:
                out, err = io.StringIO(), io.StringIO()
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    code = cli.main(["build", *words])
                check(code, out.getvalue(), err.getvalue(), folder)

            attempt(report, f"case {number}, {file.name}", case)
            for old in folder.glob("in.old"):
                for path in old.iterdir():
                    path.unlink()
                old.rmdir()
    return report


if __name__ == "__main__":
    main(run)
