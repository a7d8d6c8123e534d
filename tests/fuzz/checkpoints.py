"""Damaged checkpoints through every door: the start of training, `fuserl convert` and `fuserl verify`.

Seven files (two of numbers, the index, the plain values, and three of JSON) x 16 kinds of damage: the manifest finds
each of them at every door. Then the same and cleverer ones with the manifest written anew, as if the damage were older
than it or meant: those are refused in one line, or what comes out is what the files say.
"""

import functools
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from common import Report, Wrong, attempt, for_a_while, main
from convert.conftest import make_config, write_model

from fuserl_megatron.checkpoint.manifest import MANIFEST, PROGRESS, describe, find_damage, write_manifest
from fuserl_megatron.checkpoint.safe_load import read_common
from fuserl_megatron.checkpoint.torch_dist import INDEX
from fuserl_megatron.convert.offline import hf_to_megatron, megatron_to_hf
from fuserl_megatron.convert.weight_files import SAFE_SINGLE
from fuserl_megatron.mcore.checkpoint import read_progress
from fuserl_megatron.mcore.loading import load_state
from fuserl_megatron.proofs.verify import compare_configs, compare_tensors
from fuserl_megatron.proofs.verify_sides import open_side
from fuserl_megatron.util.errors import UserError

FOLDER = "iter_0000000"


def _changed(change: Callable[[bytearray], bytes]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.write_bytes(change(bytearray(file.read_bytes())))

    return damage


def _flipped(share: float, bit: int) -> Callable[[Path], None]:
    def flip(content: bytearray) -> bytes:
        content[int(share * (len(content) - 1))] ^= 1 << bit
        return content

    return _changed(flip)


def _filled(first: float, last: float, value: int) -> Callable[[Path], None]:
    def fill(content: bytearray) -> bytes:
        begin = int(first * len(content))
        end = max(begin + 1, min(begin + 4096, int(last * len(content))))
        content[begin:end] = bytes((value ^ (content[begin:end] == bytes([value]) * (end - begin)),)) * (end - begin)
        return content

    return _changed(fill)


def _swapped(file: Path) -> None:
    """Another file's content under this one's name."""
    other = next(f for f in sorted(file.parent.iterdir()) if f.name != file.name)
    shutil.copyfile(other, file)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "one byte shorter": _changed(lambda c: c[:-1]),
    "cut in the middle": _changed(lambda c: c[: len(c) // 2]),
    "empty": _changed(lambda c: b""),
    "one byte longer": _changed(lambda c: c + b"\0"),
    "twice": _changed(lambda c: c + c),
    "first bit": _flipped(0, 0),
    "a bit at a quarter": _flipped(0.25, 4),
    "a bit in the middle": _flipped(0.5, 2),
    "a bit at three quarters": _flipped(0.75, 6),
    "last bit": _flipped(1, 7),
    "4 KiB of zeros in front": _filled(0, 1, 0),
    "4 KiB of zeros within": _filled(0.5, 1, 0),
    "4 KiB of ones within": _filled(0.6, 1, 255),
    "reversed": _changed(lambda c: c[::-1] if c != c[::-1] else b"x"),
    "another file's": _swapped,
    "gone": Path.unlink,
}


@functools.cache
def good_run(root: Path) -> Path:
    """A model, and a checkpoint of it with the files of a training run (two of numbers, as two ranks would write)."""
    write_model(root / "hf", make_config())
    checkpoint = hf_to_megatron(root / "hf", root / "run")
    folder = checkpoint / FOLDER
    assert len(list(folder.glob("__*.distcp"))) >= 1
    (folder / PROGRESS).write_text(json.dumps({"model.path": "x", "validations": [{"step": 1, "val_loss": 2.5}]}))
    seal(folder)
    return checkpoint


def seal(folder: Path) -> None:
    """Write the manifest anew."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name != MANIFEST)
    write_manifest(folder, 0, describe(files))


def train_check(checkpoint: Path) -> None:
    """What a start of training looks at before it loads."""
    damage = find_damage(checkpoint / FOLDER, 0)
    if damage:
        raise UserError(damage)
    read_progress(checkpoint, 0)


def load(checkpoint: Path) -> None:
    """The plain values, as a resumed training reads them."""
    read_common(checkpoint / FOLDER)
    load_state({}, checkpoint / FOLDER, "")


def convert(checkpoint: Path) -> Path:
    """`fuserl convert megatron-to-hf`."""
    return megatron_to_hf(checkpoint, checkpoint.parent / "back", force=True)


def verify(checkpoint: Path) -> bool:
    """`fuserl verify` against the model, the comparisons that run neither."""
    sides = open_side(checkpoint), open_side(checkpoint.parent / "hf")
    same = compare_configs(*sides)["same"] and compare_tensors(*sides)["same"]
    return same and not any(side.problem for side in sides)


DOORS = (train_check, convert, verify)


def _must_refuse(door: Callable[[Path], object], checkpoint: Path) -> None:
    door(checkpoint)
    raise Wrong("accepted")


def try_damages(report: Report, root: Path, doors: Sequence[Callable] = DOORS, sample: int | None = None) -> None:
    """Every damage to every file (or a sample of them, another for each seed) at these doors."""
    good = good_run(root / "good")
    cases = [(file.name, kind) for file in sorted((good / FOLDER).iterdir()) for kind in DAMAGES]
    for name, kind in random.Random(report.seed).sample(cases, sample or len(cases)):
        checkpoint = _copy(good, root)
        DAMAGES[kind](checkpoint / FOLDER / name)
        for door in doors:
            attempt(report, f"{door.__name__}: {name}: {kind}", lambda d=door, c=checkpoint: _must_refuse(d, c))


def _copy(good: Path, root: Path) -> Path:
    shutil.rmtree(root / "case", ignore_errors=True)
    shutil.copytree(good.parent, root / "case")
    return root / "case" / good.name


def spoil_index(file: Path, draw: random.Random) -> None:
    """Change what the index says, the pickle being whole."""
    index = pickle.loads(file.read_bytes())
    places, keys = list(index.storage_data.values()), list(index.state_dict_metadata.values())
    place, key = draw.choice(places), draw.choice([k for k in keys if hasattr(k, "chunks")])
    odd = [-1, 0, 2**40, 2**70, 1.5, None, "x", "../x", [], (1,)]
    match draw.choice(["relative_path", "offset", "length", "size", "chunk", "twice", "no chunk", "kind", "swap"]):
        case "size":
            key.size = draw.choice([(), (1,), (2**62,), "x", (1.5, 2), *odd])
        case "chunk":
            chunk = draw.choice(key.chunks)
            setattr(chunk, draw.choice(["sizes", "offsets"]), draw.choice([(), (0,), (-1, 2), (2**40, 2, 3), *odd]))
        case "twice":
            key.chunks.append(draw.choice(key.chunks))
        case "no chunk":
            key.chunks.clear()
        case "kind":
            index.state_dict_metadata[draw.choice(list(index.state_dict_metadata))] = draw.choice([*keys, *odd])
        case "swap":  # two stretches of numbers, each in the other's place
            other = draw.choice(places)
            for name in ("relative_path", "offset", "length"):
                mine, theirs = getattr(place, name), getattr(other, name)
                object.__setattr__(place, name, theirs), object.__setattr__(other, name, mine)
        case field:
            object.__setattr__(place, field, draw.choice(odd))
    file.write_bytes(pickle.dumps(index))


def spoil(checkpoint: Path, draw: random.Random) -> str:
    """One damage and a manifest that agrees with it."""
    folder = checkpoint / FOLDER
    kind = draw.choice(["index", "index", "damage", "bytes", "json", "pipe", "root"])
    file = draw.choice(sorted(f for f in folder.iterdir() if f.name != MANIFEST))
    if kind == "index":
        file = folder / INDEX
        spoil_index(file, draw)
    elif kind == "damage":
        draw.choice(list(DAMAGES.values()))(file)
    elif kind == "bytes":
        content = bytearray(file.read_bytes())
        for _ in range(draw.choice([1, 3, 30])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        file.write_bytes(content)
    elif kind == "json":
        file = folder / draw.choice([PROGRESS, "metadata.json"])
        file.write_bytes(draw.choice([b"[]", b"[" * 9999, b"9" * 5000, b"\xff", b'{"validations": [3]}', b"{}"]))
    elif kind == "pipe":
        _pipe(file)
    else:
        (checkpoint / draw.choice(["iter_²", "iter_" + "9" * 200])).mkdir()
        file = checkpoint / draw.choice(["latest_checkpointed_iteration.txt", "lineage.json"])
        file.write_bytes(draw.choice([b"9" * 5000, "²".encode(), b"\xff", b"-1", b"0x0", b"", b"1e9", b"[]", b"7"]))
    seal(folder)
    return f"{kind} {file.name}"


def run(seed: int, seconds: float, cases: int | None = None) -> Report:
    """Plain damages first (all of them where there is time), which the manifest must find; then clever ones."""
    report, root = Report("checkpoints", seed), Path(tempfile.mkdtemp(prefix="fuzz-checkpoints-"))
    try:
        good = good_run(root / "good")
        attempt(report, "undamaged", lambda: [train_check(good), load(good), convert(good)])
        attempt(report, "undamaged, verify", lambda: verify(good) or _raise("undamaged, and verify says it differs"))
        try_damages(report, root, sample=None if seconds > 20 else 30)
        for draw in for_a_while(seconds, cases, seed):
            checkpoint = _copy(good, root)
            what = spoil(checkpoint, draw)
            attempt(report, f"train: {what}", lambda c=checkpoint: [train_check(c), load(c)])
            accepted = attempt(report, f"convert: {what}", lambda c=checkpoint: convert(c)) == "done"
            same = [None]
            attempt(report, f"verify: {what}", lambda c=checkpoint, s=same: s.__setitem__(0, verify(c)))
            if accepted and same[0] is not None:  # both read the same files: they say the same
                back = (checkpoint.parent / "back" / SAFE_SINGLE).read_bytes()
                if (back == (good.parent / "back" / SAFE_SINGLE).read_bytes()) is not same[0]:
                    report.failures.append(f"wrong: {what}: convert and verify do not agree")
    finally:
        shutil.rmtree(root)
    return report


def _raise(text: str) -> None:
    raise Wrong(text)


if __name__ == "__main__":
    main(run)
