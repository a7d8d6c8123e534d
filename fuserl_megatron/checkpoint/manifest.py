"""What a checkpoint's folder must hold: size and sha256 of every file, in manifest.json, which covers itself too.

Pure file code. A file is hashed by the rank that wrote it, as it comes back from the file system; on start the ranks
share the files between them.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuserl_megatron.checkpoint.torch_dist import AGAIN, CONFIG, INDEX, is_number
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import file_sha256, sync_path
from fuserl_megatron.util.json_files import BadFile, is_plain_name, parse_json, read_bytes

MANIFEST, PROGRESS = "manifest.json", "progress.json"
THREADS = 4
"""Files hashed at a time by one process: hashing leaves Python's lock alone."""


def describe(files: Iterable[Path]) -> dict[str, dict]:
    """Bring the files to the disk; their entries of the manifest by name."""

    def entry(file: Path) -> dict:
        sync_path(file)
        return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}

    files = list(files)
    with ThreadPoolExecutor(THREADS) as pool:
        return {file.name: found for file, found in zip(files, pool.map(entry, files), strict=True)}


def write_manifest(directory: Path, iteration: int, files: dict[str, dict]) -> None:
    """Write manifest.json and bring it and the directory to the disk."""
    content = {"format": 1, "iteration": iteration, "files": files}
    (directory / MANIFEST).write_text(_with_own_hash(content), encoding="utf-8")
    sync_path(directory / MANIFEST)
    sync_path(directory)


def _with_own_hash(content: dict) -> str:
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=1, sort_keys=True) + "\n"


def find_damage(directory: Path, iteration: int | None, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint: file and fault, None where it is whole. Looks at one of `parts` equal shares of
    the files; iteration is the one that the folder's name promises, None where the name says nothing."""
    file = directory / MANIFEST
    try:
        content = read_bytes(file)
        found = parse_json(content, file)
        del found["sha256"]
        files = found["files"]
        if content.decode() != _with_own_hash(found):
            return f"{MANIFEST} does not match its own checksum"
        if iteration not in (None, found["iteration"]):
            return f"{MANIFEST} is of step {found['iteration']}"
        for name in sorted({INDEX, CONFIG} - set(files)):
            return f"{MANIFEST} does not list {name}"
        # the largest first, in turn: equal shares
        names = sorted(files, key=lambda name: (-files[name]["bytes"], name))[part::parts]
    except BadFile as error:
        return f"{MANIFEST} is missing" if not file.exists() else f"{MANIFEST} cannot be used: {error.reason}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable JSON of a manifest"
    with ThreadPoolExecutor(THREADS) as pool:
        faults = pool.map(lambda name: _fault_of(directory / name, files[name]), names)
        return next(filter(None, faults), None)


def refuse_damage(folder: Path) -> None:
    """Look at a checkpoint as a start of training does, before anything reads it.

    One that Megatron-LM wrote, or a version of this program that wrote none for conversions, has no manifest: it is
    taken, with a line on stderr that says so. A run's own (it has progress.json) always had one.

    Raises:
        UserError: a file is not as it was written.
    """
    if not (folder / MANIFEST).exists() and not (folder / PROGRESS).exists():
        print(f"WARNING: {folder}: no {MANIFEST}, so its files cannot be checked for damage", file=sys.stderr)
        return
    number = folder.name.removeprefix("iter_")
    damage = find_damage(folder, int(number) if is_number(number) else None)
    if damage:
        raise UserError(f"{folder}: damaged checkpoint: {damage}; {AGAIN}")


def _fault_of(file: Path, entry: dict) -> str | None:
    try:
        if not is_plain_name(file.name) or not file.is_file():
            return f"{file.name} is missing" if not file.exists() else f"{file.name} is not a regular file"
        if (size := file.stat().st_size) != entry["bytes"]:
            return f"{file.name} has {size} bytes instead of {entry['bytes']}"
        if file_sha256(file) != entry["sha256"]:
            return f"{file.name} has another checksum than when it was written"
    except FileNotFoundError:  # a moment ago it was there
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    return None
