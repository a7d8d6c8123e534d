"""Stored reference log-probabilities: one float32 per response of the data set, memory-mapped, NaN where not scored.

Two files in a directory: `reference_logps.f32` (raw little-endian float32) and `reference.json` (the key, the number of
responses and, once scoring is complete, the sha256 of the numbers). The key is a hash of everything the numbers depend
on; a directory with another key is refused, never overwritten. One rank writes; every rank may read.

float32, not the float64 that the policy's sums are accumulated in: the token log-probabilities behind a sum come from
fp32 or bf16 arithmetic, and rounding a sum of 1,000 nats moves it by at most 3e-5, of which a loss sees beta times. The
resident and swapped references round alike (train/reference.py).
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fuserl_megatron.data.dataset import Manifest
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import file_sha256, write_file
from fuserl_megatron.util.json_files import read_json

DATA_FILE, KEY_FILE = "reference_logps.f32", "reference.json"


def hash_model_directory(path: str | Path) -> str:
    """sha256 over config.json and the contents of all safetensors files of a Hugging Face directory, by name.

    Raises:
        UserError: not a directory, no config.json, or no safetensors file.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a Hugging Face model directory (no config.json)")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{path} holds no .safetensors file: save the model with save_pretrained")
    digest = hashlib.sha256()
    for file in [path / "config.json", *weights]:
        digest.update(f"{file.name}\n{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def reference_key(model_hash: str, manifest: Manifest, precision: str) -> str:
    """The key of a cache: model weights (`hash_model_directory`), data set, tokenizer, template and number format.

    The last is trainer.precision of the scoring pass; bf16 and fp32 give different numbers.
    """
    parts = [model_hash, manifest.hash, manifest.tokenizer_hash, manifest.chat_template_hash, precision]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class ReferenceCache:
    """Summed reference log-probabilities by response id (data set numbering)."""

    def __init__(self, directory: Path, key: str, num_responses: int, complete: bool, writable: bool):
        """Use `open_or_create` or `open`."""
        self.directory, self.key, self.num_responses, self.complete = directory, key, num_responses, complete
        mode: Literal["r+", "r"] = "r+" if writable else "r"
        self._logps = np.memmap(directory / DATA_FILE, dtype="<f4", mode=mode, shape=(num_responses,))

    @classmethod
    def open_or_create(cls, directory: str | Path, key: str, num_responses: int) -> "ReferenceCache":
        """Open for writing; an existing cache with this key is continued. Call it on one rank only.

        Raises:
            UserError: the directory holds a cache of another model, data set, tokenizer or template, or a damaged one.
        """
        directory = Path(directory)
        if not (directory / KEY_FILE).exists():
            directory.mkdir(parents=True, exist_ok=True)
            write_file(directory / DATA_FILE, [np.full(num_responses, np.nan, "<f4").tobytes()])
            cls._write_key(directory, key, num_responses)  # last: its presence makes the cache valid
        return cls(directory, key, num_responses, cls._check(directory, key, num_responses), writable=True)

    @classmethod
    def open(cls, directory: str | Path, key: str, num_responses: int) -> "ReferenceCache":
        """Open for reading.

        Raises:
            UserError: there is no cache, or it does not fit (see `open_or_create`).
        """
        directory = Path(directory)
        if not (directory / KEY_FILE).exists():
            raise UserError(f"{directory} holds no reference log-probabilities: run the scoring pass first")
        return cls(directory, key, num_responses, cls._check(directory, key, num_responses), writable=False)

    @staticmethod
    def stored_key(directory: str | Path) -> str | None:
        """The key of the cache in a directory, None where there is none that can be read."""
        try:
            return read_json(Path(directory) / KEY_FILE)["key"]
        except (UserError, KeyError):
            return None

    def write(
        self,
        response_ids: torch.Tensor | np.ndarray,
        logps: torch.Tensor | np.ndarray,
        place: Callable[[int], str] = str,
    ) -> None:
        """Store the [N] summed log-probabilities of the scored tokens of [N] responses (data set ids).

        `place` says where a response was read, for messages.

        Raises:
            UserError: a value is NaN or infinite.
        """
        values = torch.as_tensor(logps).detach().to("cpu", torch.float32).numpy()
        ids = torch.as_tensor(response_ids).cpu().numpy()
        if not np.isfinite(values).all():
            bad = ids[~np.isfinite(values)][:5].tolist()
            where = "" if place is str else f" ({', '.join(map(place, bad))})"
            raise UserError(
                f"the reference model gives a non-finite log-probability for responses {bad}{where}: "
                "look for NaN in its weights, or try trainer.precision=32"
            )
        if self.complete:  # more than was ever scored before: the checksum no longer holds
            self._write_key(self.directory, self.key, self.num_responses)
            self.complete = False
        self._logps[ids] = values

    def flush(self) -> None:
        """Bring what was written to the disk."""
        self._logps.flush()

    def finish(self, response_ids: torch.Tensor | np.ndarray) -> None:
        """Flush and mark the cache complete for these responses.

        Raises:
            ValueError: one of them has no value.
        """
        ids = torch.as_tensor(response_ids).cpu().numpy()
        missing = ids[self.missing_mask[ids]]
        if missing.size:
            raise ValueError(f"{missing.size} responses have no reference log-probability, the first is {missing[0]}")
        self.flush()
        self._write_key(self.directory, self.key, self.num_responses, self.sha256)
        self.complete = True

    @property
    def sha256(self) -> str:
        """Of the numbers: a run that goes on with others is not the same to the last bit."""
        return file_sha256(self.directory / DATA_FILE)

    @property
    def missing_mask(self) -> np.ndarray:
        """[num_responses] bool, True where no value is stored (for `GlobalBatchSampler.scoring_plans`)."""
        return np.isnan(self._logps)

    def scores(self, batches: object) -> "ReferenceCache":
        """Itself: whatever the batches, it looks up."""
        return self

    def lookup(self, response_ids: torch.Tensor) -> torch.Tensor:
        """[N] float32 on the CPU.

        Raises:
            UserError: a response has no value.
        """
        ids = response_ids.cpu().numpy()
        values = np.array(self._logps[ids], dtype=np.float32)
        if np.isnan(values).any():
            first = int(ids[np.isnan(values)][0])
            raise UserError(
                f"{self.directory}: response {first} has no reference log-probability: run the scoring pass again"
            )
        return torch.from_numpy(values)

    @staticmethod
    def _write_key(directory: Path, key: str, num_responses: int, sha256: str | None = None) -> None:
        text = json.dumps({"key": key, "num_responses": num_responses, "sha256": sha256}) + "\n"
        write_file(directory / KEY_FILE, [text.encode()])

    @staticmethod
    def _check(directory: Path, key: str, num_responses: int) -> bool:
        """Whether the cache is complete."""
        try:
            stored = read_json(directory / KEY_FILE)
            found = stored["key"], stored["num_responses"], (directory / DATA_FILE).stat().st_size
            sha256 = stored["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{directory}: damaged reference cache: delete the directory, it is made anew") from None
        if found[0] != key:
            what = "another reference model, data set, tokenizer, template or precision"
            raise UserError(f"{directory} holds log-probabilities of {what}: delete it, or use another directory")
        if found[1:] != (num_responses, 4 * num_responses):
            raise UserError(f"{directory}: damaged reference cache (size): delete the directory, it is made anew")
        if sha256 is not None and sha256 != file_sha256(directory / DATA_FILE):
            raise UserError(f"{directory}: damaged reference cache (checksum): delete the directory, it is made anew")
        return sha256 is not None
