"""The fused data set on disk: a directory with `groups.arrow` (memory-mapped) and `manifest.json`.

One row of groups.arrow is one group: `prompt` list<int32>, `responses` list<list<int32>> (the scored tokens), and one
entry per response in `source_ids` list<int32>, `rewards` list<double>, `truncated` list<bool>, `inputs` list<int32> and
`lines` list<int64> (where it was read). Responses are numbered through the whole data set; a group's are consecutive.

Shapes: G groups, R responses of the whole data set.
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from fuserl_megatron.data.manifest import FORMAT_VERSION as FORMAT_VERSION
from fuserl_megatron.data.manifest import MANIFEST_FILE as MANIFEST_FILE
from fuserl_megatron.data.manifest import Manifest as Manifest
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import file_sha256

GROUPS_FILE, REJECTED_FILE = "groups.arrow", "rejected.jsonl"
ROWS_PER_BATCH = 1024
"""Rows of one Arrow record batch (all but the last are full, so that row i is found by division)."""
SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(pa.int32())),
        ("responses", pa.list_(pa.list_(pa.int32()))),
        ("source_ids", pa.list_(pa.int32())),
        ("rewards", pa.list_(pa.float64())),
        ("truncated", pa.list_(pa.bool_())),
        ("inputs", pa.list_(pa.int32())),
        ("lines", pa.list_(pa.int64())),
    ]
)
SOURCE_LOGPS = pa.field("source_mean_logps", pa.list_(pa.float64()))
"""A further column where records carry it: K values a response, NaN where a source has none; a row holds them flat."""


class FusedDataset:
    """A fused data set opened for reading. Tokens stay on disk; lengths, sources and rewards are arrays in memory.

    Attributes:
        manifest: what `build` recorded.
        prompt_lengths: [G] int64 tokens.
        response_offsets: [G + 1] int64; group g owns responses response_offsets[g] to response_offsets[g + 1].
        response_lengths: [R] int64 scored tokens.
        source_ids: [R] int64.
        rewards: [R] float64.
        source_mean_logps: [R, K] float64 nats per token, NaN where a source has no value; None without such records.
    """

    def __init__(self, path: str | Path, verify: bool = True):
        """Open a directory written by `fuserl build`.

        `verify` hashes groups.arrow and compares (reads the file once); the size is always compared.

        Raises:
            UserError: not a fused data set, or groups.arrow is not the file the manifest describes.
        """
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        file = self.path / GROUPS_FILE
        if not file.is_file() or os.path.getsize(file) != self.manifest.num_bytes:
            size = os.path.getsize(file) if file.is_file() else "no"
            what = f"{size} bytes, the manifest says {self.manifest.num_bytes}"
            raise UserError(f"{file}: {what}: copy the directory again or build it again")
        if verify and file_sha256(file) != self.manifest.hash:
            raise UserError(f"{file}: its content is not what the manifest describes (hash): copy or build it again")
        self._map_file(file)
        m = self.manifest
        found = {
            "num_prompts": self.num_groups,
            "num_responses": self.num_responses,
        }  # format 1 covers itself by no hash
        for name, number in found.items():
            if getattr(m, name) != number:
                raise UserError(
                    f"{self.path}: {name} of its manifest is {getattr(m, name)}, not {number}: build it again"
                )
        if self.source_ids.max(initial=0) >= len(m.sources):
            raise UserError(f"{self.path}: its manifest names {len(m.sources)} sources, it has more: build it again")

    @classmethod
    def from_arrow(cls, file: Path) -> "FusedDataset":
        """Only the arrays of a groups.arrow that has no manifest yet (used while building)."""
        dataset = cls.__new__(cls)
        dataset.path = file.parent
        dataset._map_file(file)
        return dataset

    fingerprint: str | None = None
    """Of a view (prepared.py), a hash of what it changes; None: nothing."""

    def _map_file(self, file: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        self._batches = batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._prompts = [_list_views(b.column("prompt")) for b in batches]
        self._responses = [_list_views(b.column("responses").values) for b in batches]
        counts = np.concatenate([np.diff(b.column("responses").offsets.to_numpy()) for b in batches])
        self.response_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.prompt_lengths = np.concatenate([np.diff(o) for o, _ in self._prompts]).astype(np.int64)
        self.response_lengths = np.concatenate([np.diff(o) for o, _ in self._responses]).astype(np.int64)
        self.source_ids = np.concatenate([_values(b.column("source_ids")) for b in batches]).astype(np.int64)
        self.rewards = np.concatenate([_values(b.column("rewards")) for b in batches])
        self.source_mean_logps = None
        if SOURCE_LOGPS.name in reader.schema.names:
            flat = np.concatenate([_values(b.column(SOURCE_LOGPS.name)) for b in batches])
            self.source_mean_logps = flat.reshape(self.response_lengths.size, -1)

    @property
    def hash(self) -> str:
        """sha256 of the groups: the data set's identity."""
        return self.manifest.hash

    @property
    def sources(self) -> list[str]:
        """Source names by id."""
        return self.manifest.sources

    @property
    def num_groups(self) -> int:
        """Prompts in the data set."""
        return self.prompt_lengths.size

    @property
    def num_responses(self) -> int:
        """Responses of all prompts."""
        return self.response_lengths.size

    @property
    def max_token_id(self) -> int:
        """The largest token id of all prompts and responses."""
        return max(int(values.max()) for _, values in (*self._prompts, *self._responses))

    def used_token_ids(self) -> np.ndarray:
        """Every token id that occurs, ascending."""
        seen = np.zeros(self.max_token_id + 1, bool)
        for _, values in (*self._prompts, *self._responses):
            seen[values] = True
        return np.flatnonzero(seen)

    def prompt(self, i: int) -> np.ndarray:
        """Prompt tokens of group i, int32."""
        offsets, values = self._prompts[i // ROWS_PER_BATCH]
        row = i % ROWS_PER_BATCH
        return values[offsets[row] : offsets[row + 1]]

    def response(self, i: int, response_id: int) -> np.ndarray:
        """Tokens of a response (data set id) of group i, int32."""
        first = (i // ROWS_PER_BATCH) * ROWS_PER_BATCH
        offsets, values = self._responses[i // ROWS_PER_BATCH]
        row = response_id - self.response_offsets[first]
        return values[offsets[row] : offsets[row + 1]]

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Where every response was read: [R] index into the inputs, [R] line or row."""
        inputs, lines = (np.concatenate([_values(b.column(c)) for b in self._batches]) for c in ("inputs", "lines"))
        return inputs, lines

    def prompt_place(self, i: int) -> str:
        """Where the first response of group i was read (for messages that name a prompt)."""
        return self.place(int(self.response_offsets[i]))

    def place(self, response_id: int) -> str:
        """Where a response was read, as file:line (for messages that name a response)."""
        i = int(np.searchsorted(self.response_offsets, response_id, side="right")) - 1
        batch, within = self._batches[i // ROWS_PER_BATCH], int(response_id - self.response_offsets[i])
        name, line = (batch.column(c)[i % ROWS_PER_BATCH][within].as_py() for c in ("inputs", "lines"))
        known = self.manifest.inputs[name].get("name") if name < len(self.manifest.inputs) else None
        return f"{known or f'input {name}'}:{line}"


def _values(column: pa.ListArray) -> np.ndarray:
    return column.values.to_numpy(zero_copy_only=False)


def _list_views(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets relative to the values, and these."""
    return column.offsets.to_numpy(), column.values.to_numpy()
