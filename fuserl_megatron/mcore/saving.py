"""One checkpoint on its way to the disk: collected at a step, written at once or in the background, then published.

    checkpoints/iter_0000010/                     torch_dist with the key names of GPTModel, and beside it
    checkpoints/iter_0000010/progress.json        what the run needs to go on
    checkpoints/iter_0000010/manifest.json        size and checksum of every file
    checkpoints/latest_checkpointed_iteration.txt the pointer, moved last, by rename

A checkpoint under way lives in a hidden sibling directory and gets its name only when it is whole and on the disk.
Core says what belongs into it and who holds which part; the files are written here (0.16's own writer forks the
training process, and either core's starts a process that outlives a killed rank). In the background it is a thread that
writes: it dies with its rank, so that nothing writes into the folders of the run that comes after.
"""

import copy
import json
import secrets
import shutil
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from fuserl_megatron.checkpoint.manifest import PROGRESS, describe, write_manifest
from fuserl_megatron.checkpoint.torch_dist import (
    COMMON,
    CONFIG,
    INDEX,
    POINTER,
    DistWriter,
    iteration_directory,
    saved_iterations,
)
from fuserl_megatron.mcore.parallel import Layout
from fuserl_megatron.mcore.precision import plain
from fuserl_megatron.runtime.collectives import any_rank, from_all_ranks, from_main_rank
from fuserl_megatron.util.files import sync_path, write_file


class NotWritten(OSError):
    """No checkpoint came of it. `by_disk`: the disk refused; else the program is at fault, and room would not help."""

    def __init__(self, text: str, by_disk: bool):
        super().__init__(text)
        self.by_disk = by_disk


class Saving:
    """Every rank makes one at the same step, and calls its methods at the same time as the others."""

    def __init__(self, layout: Layout, state: dict, root: str | Path, iteration: int, progress: dict, background: bool):
        """Take core's sharded state dict and start writing it into the run's checkpoints folder; JSON-able progress
        travels along, for `checkpoint.read_progress`.

        In the background the state is copied into memory of the host, and this returns while it is written.
        """
        self.layout, self.root, self.iteration, self.background = layout, Path(root), iteration, background
        sharded, common = save_preprocess(state | {"iteration": iteration})
        # plain values are small, and an optimizer changes them in place: always a copy
        self._common, self._progress = copy.deepcopy(common), copy.deepcopy(progress)
        self._tensors: list[tuple[str, tuple, tuple, tuple, torch.Tensor]] = []
        self._objects: dict[str, list] = defaultdict(list)
        parts = list(nested_values(sharded))
        own = _own_chunks(layout, [part for part in parts if isinstance(part, ShardedTensor)])
        for part in parts:
            if isinstance(part, ShardedObject):
                if is_main_replica(part.replica_id):
                    self._objects[part.unique_key].append(copy.deepcopy(part.data))
            elif (chunk := (part.key, part.global_offset)) in own:
                own.remove(chunk)
                sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
                data = snapshot(part.data) if background else part.data.detach()
                self._tensors.append((part.key, tuple(part.global_shape), tuple(part.global_offset), sizes, data))
        self.start()

    def start(self) -> None:
        """Write what was taken, from the beginning: also after a failure."""
        self._problem: Exception | None = None
        self._written: tuple[DistWriter, dict[str, Any]] | None = None
        partial, problem = None, None
        if self.layout.is_main:
            name = iteration_directory(self.root, self.iteration).name
            try:
                remove_leftovers(self.root)
                # a name of its own: nothing left over from a killed run can write into it
                partial = self.root / f".{name}.{secrets.token_hex(4)}.partial"
                partial.mkdir(parents=True)
            except OSError as error:
                problem = first_line(error)
        self._partial, problem = from_main_rank((partial, problem), self.layout.device)
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        if problem:
            self._problem = OSError(problem)
        elif self.background:
            self._thread.start()
        else:
            self._write()

    def _write(self) -> None:
        """This rank's part, no word to other ranks."""
        try:
            with DistWriter(self._partial, self.layout.rank) as writer:
                for key, size, offsets, sizes, data in self._tensors:
                    place = writer.reserve(key, size, offsets, sizes, data.dtype)
                    writer.write(place, plain(data).cpu().contiguous())
                for key, values in self._objects.items():
                    writer.object(key, values)
            self._written = writer, describe(writer.files)
        except Exception as error:
            self._problem = error

    def is_written(self) -> bool:
        """Whether every rank has written its part, or failed to: then `publish` does not wait."""
        return not any_rank(self._thread.is_alive(), self.layout.device)

    def publish(self, keep: int, kept: Sequence[int] = (), damaged: Sequence[int] = ()) -> Path:
        """Wait for every rank, give the checkpoint its name, move the pointer, remove old ones.

        Args:
            keep: how many of the newest to keep; -1 keeps all.
            kept: iterations that are never removed (the best ones).
            damaged: iterations that do not count.

        Raises:
            NotWritten: on every rank; nothing half-written is left and older checkpoints are untouched.
        """
        if self._thread.is_alive():
            self._thread.join()
        self._all_or_none()
        assert self._written is not None
        writer, files = self._written
        parts: list[Any] = [None] * self.layout.world_size
        dist.gather_object((writer.index, files), parts if self.layout.is_main else None, dst=0)
        final = iteration_directory(self.root, self.iteration)
        if self.layout.is_main:
            try:
                writer.finish(self._common, [index for index, _ in parts[1:]])
                text = json.dumps(self._progress, indent=2) + "\n"
                (self._partial / PROGRESS).write_text(text, encoding="utf-8")
                files = describe(self._partial / name for name in (COMMON, CONFIG, INDEX, PROGRESS))
                for _, written in parts:
                    files |= written
                write_manifest(self._partial, self.iteration, files)
                _rename(self.root, self._partial, final, self.iteration)
                # by age of the run, not by number alone: after going back to an older step, later ones do not count
                past = [i for i in saved_iterations(self.root) if i <= self.iteration and i not in damaged]
                for old in past[:-keep] if keep > 0 else []:
                    if old not in kept:
                        _remove(iteration_directory(self.root, old))
            except Exception as error:
                self._problem = error
        self._all_or_none()
        return final

    def _all_or_none(self) -> None:
        mine = self._problem and (first_line(self._problem), isinstance(self._problem, OSError))
        failed = [(rank, *problem) for rank, problem in enumerate(from_all_ranks(mine)) if problem]
        if failed:
            if self.layout.is_main and self._partial:
                shutil.rmtree(self._partial, ignore_errors=True)
            rank, said, _ = failed[0]
            folder = iteration_directory(self.root, self.iteration)
            raise NotWritten(f"{folder}: not written (rank {rank}: {said})", all(by_disk for *_, by_disk in failed))


def remove_leftovers(root: Path) -> None:
    """What a killed run was writing or removing, none of it under its name. One rank, while no save is under way."""
    for left in root.glob(".iter_*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    (root / f"{POINTER}.partial").unlink(missing_ok=True)


def _own_chunks(layout: Layout, tensors: Sequence[ShardedTensor]) -> set[tuple[str, tuple]]:
    """What this rank writes: data-parallel ranks hold the same, and share the work by bytes. The same plan on all."""
    held = from_all_ranks({(t.key, t.global_offset): t.data.nbytes for t in tensors})
    load, own = [0] * layout.world_size, set()
    for chunk, size in sorted(
        {c: n for chunks in held for c, n in chunks.items()}.items(), key=lambda c: (-c[1], c[0])
    ):
        writer = min((rank for rank in range(layout.world_size) if chunk in held[rank]), key=lambda rank: load[rank])
        load[writer] += size
        if writer == layout.rank:
            own.add(chunk)
    return own


def snapshot(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, which the coming steps do not change."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _rename(root: Path, partial: Path, final: Path, iteration: int) -> None:
    _remove(final)
    partial.rename(final)
    sync_path(root)
    write_file(root / POINTER, [f"{iteration}\n".encode()])
    sync_path(root)


def _remove(directory: Path) -> None:
    """Take the name away first: whoever is killed in the middle leaves no checkpoint that looks whole."""
    if directory.exists():
        hidden = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")
        directory.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def first_line(error: BaseException) -> str:
    """Class and message of an error on one line."""
    failures = getattr(error, "failures", None)  # a CheckpointException names the ranks; the cause is in here
    if failures:
        error = next(iter(failures.values()))[0]
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
