"""Which inputs are meant: files, globs, folders, hub data sets, and the scored responses that `fuserl score` wrote."""

import glob
import os
import re
from collections.abc import Sequence

from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.json_files import read_json
from fuserl_megatron.util.paths import did_you_mean

FIELDS = ("prompt", "source", "response", "reward")
OPTIONAL_FIELDS = ("source_mean_logps", "tools")
IGNORED_FIELDS = ("meta", "rewards", "key")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow", ".csv")
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?$")

Place = tuple[str, int]
"""Where a record was read: file (or hub name) and line or row, counted from 1."""


def expand_inputs(inputs: Sequence[str], key: str = "inputs", own_reader: bool = False) -> list[str]:
    """Files in the order given (those of a glob or folder sorted) and hub names; each once.

    Args:
        inputs: files, globs, folders (their files at any depth), directories that `fuserl score` wrote, hub names.
        key: the setting's name, for messages.
        own_reader: a reader of one's own takes files of any suffix, and no folders or hub names.

    Raises:
        UserError: nothing given, a glob or folder without a match, a file of another kind, no such file.
    """
    kinds = ", ".join(SUFFIXES)
    if not inputs:
        raise UserError(f"{key} is empty: name at least one file ({kinds}), folder, glob or hub data set")
    names: list[str] = []
    for item in inputs:
        if os.path.isdir(item) and not own_reader:
            matches = _of_folder(item)
        elif os.path.lexists(item):
            matches = [item]
        elif glob.has_magic(item):
            matches = sorted(glob.glob(item, recursive=True))
            if not matches:
                raise UserError(f"{key}: no file matches {item!r} (looked from {os.getcwd()})")
        elif not own_reader and HUB_NAME.match(item) and not item.endswith((*SUFFIXES, ".txt", ".gz")):
            names.append(item)
            continue
        else:
            raise UserError(f"{key}: {item} does not exist{did_you_mean(item)}")
        for match in matches:
            if not os.path.isfile(match):  # one that waits for a writer, or whose target is gone
                raise UserError(f"{key}: {match} is no regular file: name one, or take it out of the glob")
            if not own_reader and not match.endswith(SUFFIXES):
                advice = "convert it to one record per line (JSONL), or name a reader of your own (docs/extending.md)"
                raise UserError(f"{key}: {match} is not {kinds}: {advice}")
        names.extend(matches)
    return list(dict.fromkeys(names))


def _of_folder(folder: str) -> list[str]:
    if scored := scored_records(folder):
        return [scored]
    found = [
        os.path.join(root, file)
        for root, folders, files in os.walk(folder)
        for file in files
        if file.endswith(SUFFIXES) and not file.startswith(".")
    ]
    if not found:
        raise UserError(f"{folder} is a directory without files that could be read ({', '.join(SUFFIXES)})")
    return sorted(found)


def scored_records(directory: str) -> str | None:
    """The file of records in a directory that `fuserl score` wrote; None for any other directory.

    Raises:
        UserError: the run is not finished, the file was changed since, or the answers have no rewards yet.
    """
    done, records = os.path.join(directory, "done.json"), os.path.join(directory, "records.jsonl")
    found = read_json(done) if os.path.isfile(done) else {}
    if found.get("format") == "fuserl scored responses":
        size = os.path.getsize(records) if os.path.isfile(records) else None
        if size != found["bytes"]:
            what = "is missing" if size is None else f"has {size} bytes, not {found['bytes']}: it was changed since"
            raise UserError(f"{records} {what}; type the command of `fuserl score` again")
        return records
    if os.path.isdir(os.path.join(directory, "rewards")):
        raise UserError(
            f"{directory}: its scoring is not finished; type the command of `fuserl score` again: it goes on"
        )
    if glob.glob(os.path.join(glob.escape(directory), "*", "plan.json")):
        raise UserError(f"{directory}: answers without rewards; `fuserl score samples={directory} ...` comes first")
    return None
