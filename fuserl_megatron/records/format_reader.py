"""The rows of one file as records: its format recognised by the first row, fields of other names found.

`fields` maps a name of ours to where a row has it: a path of keys (`scores.overall`, `annotations.0.rating`), or
`=text` for the same in every record.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuserl_megatron.records.formats import ALIASES, FORMATS, Format, Misfit, Row
from fuserl_megatron.records.inputs import FIELDS, Place
from fuserl_megatron.records.messages import BadRecord
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import nearest

OWN = FORMATS["records"]


def check_format(format: str, fields: Mapping[str, str]) -> None:
    """Whether the settings make sense.

    Raises:
        UserError: there is no such format, or a path in `fields` is empty or no text.
    """
    known = ("auto", *FORMATS)
    if format not in known:
        raise UserError(f"format={format}: not one of {', '.join(known)}.{nearest(format, known)}")
    for name, path in fields.items():
        if not isinstance(path, str) or not path:
            raise UserError(f"fields.{name}={path}: must be a path of keys, or =text; scores.overall would work.")


class FormatReader:
    """Reads the rows of one file, all in one format.

    Args:
        file: its name; the stem is the source of records that name none.
        format: a name of FORMATS, or auto.
        fields: as above.
    """

    def __init__(self, file: str, format: str = "auto", fields: Mapping[str, str] | None = None):
        self.format: Format | None = FORMATS.get(format)
        self._stem, self._fields, self._text_only = stem(file), dict(fields or {}), file.endswith(".csv")

    def needed(self, columns: Sequence[str]) -> Sequence[str]:
        """Which columns a table must have: those of our own format where the table is of no other."""
        other = [f for f in FORMATS.values() if f is not OWN and set(f.needs) <= set(columns)]
        if self._fields or other or self.format not in (None, OWN):
            return ()
        return [name for name in FIELDS if not set(columns) & set(ALIASES.get(name, ()))]

    def records(self, place: Place, row: Row) -> Iterator[Row]:
        """The records of a row.

        Raises:
            BadRecord: the row is not of the file's format, or of none; the message says what is missing.
        """
        given = {name: self._value(place, row, name, path) for name, path in self._fields.items()}
        row = row | given if given else row
        self.format = self.format or _recognised(place, row)
        if self.format is OWN:
            yield from map(self._with_numbers, OWN.records(row))
            return
        missing = [repr(name) for name in self.format.needs if row.get(name) is None]
        if missing:
            problem = f"a row of format {self.format.name} needs {', '.join(missing)}: {self.format.looks}"
            raise BadRecord(place, "misfit", problem)
        fixed = {name: value for name, value in given.items() if name in FIELDS and name not in self.format.needs}
        try:
            for record in self.format.records(row):
                yield _scored(place, self._with_numbers({"source": self._stem} | record | fixed))
        except Misfit as misfit:
            raise BadRecord(place, "misfit", f"no row of format {self.format.name}: {misfit}") from None

    def _with_numbers(self, record: Row) -> Row:
        """A CSV file's reward, which is text there, as the number it says."""
        if self._text_only and isinstance(record.get("reward"), str):
            with contextlib.suppress(ValueError):
                return record | {"reward": float(record["reward"])}
        return record

    def _value(self, place: Place, row: Row, name: str, path: str) -> Any:
        if path.startswith("="):
            try:
                return json.loads(path[1:])
            except ValueError:
                return path[1:]
        value: Any = row
        for key in path.split("."):
            if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                near = nearest(key, value) if isinstance(value, dict) else ""
                raise BadRecord(place, "misfit", f"fields.{name}={path}: there is no {key!r} in this row.{near}")
        return value


def _scored(place: Place, record: Row) -> Row:
    if record.get("reward") is None:
        problem = (
            "there is no reward: name its field (fields.reward=scores.overall), or give all responses the same "
            "(fields.reward='=0': then all sources weigh alike, and there are no pairs)"
        )
        raise BadRecord(place, "missing_reward", problem)
    return record


def _recognised(place: Place, row: Row) -> Format:
    """The first format whose fields are all there; ours where some of its own are, for its messages say the rest.

    Raises:
        BadRecord: none fits.
    """
    for format in FORMATS.values():
        if all(row.get(name) is not None for name in format.needs):
            return format
    nearly = [f for f in FORMATS.values() if f is not OWN and any(name in row for name in f.needs)]
    if any(name in row for name in FIELDS if name != "prompt") or not nearly:
        return OWN
    raise BadRecord(place, "misfit", f"fits no format; nearly: {'; '.join(f'{f.name} {f.looks}' for f in nearly[:3])}")


def stem(file: str) -> str:
    """A file's name without folders and endings."""
    return Path(file).name.partition(".")[0] or file
