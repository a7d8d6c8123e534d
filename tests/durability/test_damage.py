"""Damaged checkpoints and saves that fail: always noticed and named, the last good checkpoint used or a clear stop."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import shutil
from pathlib import Path

import pytest
from fusion_case import DPO, SFT, make_config

from fuserl_megatron.config.schema import CheckpointConfig

POINTER = "latest_checkpointed_iteration.txt"
LAYOUT = dict(tp=2, distopt=True)  # both ranks write


def config_of(case, directory, objective=SFT, max_steps=4, layout=LAYOUT, **checkpoint):
    config = make_config(
        case, objective, global_batch_size=3, max_steps=max_steps, results_dir=str(directory), **layout
    )
    checkpoint = CheckpointConfig(**{"every_n_train_steps": 2} | checkpoint)
    manager = dataclasses.replace(config.exp_manager, checkpoint_callback_params=checkpoint)
    return dataclasses.replace(config, exp_manager=manager)


def run(config, prepare=None):
    """Train; the exit code and what rank 0 says."""
    from fuserl_megatron.train.loop import train

    out = io.StringIO()
    with contextlib.redirect_stdout(out), prepare() if prepare else contextlib.nullcontext():
        return train(config), out.getvalue().splitlines()


def losses(directory):
    rows = map(json.loads, (Path(directory) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


@pytest.fixture(scope="module")
def whole(ranks, case, tmp_path_factory):
    """Four undisturbed steps on TP2 with the distributed optimizer, checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("whole")
    assert [code for code, _ in ranks.run(run, 2, config_of(case, directory))] == [0, 0]
    return directory


def look_on_start(directories):
    """What a start finds in each: (step, damaged, what rank 0 says), or the message it ends with."""
    from fuserl_megatron.config.schema import Config, ModelConfig, TrainerConfig
    from fuserl_megatron.mcore import parallel
    from fuserl_megatron.train.resume import steps_to_resume
    from fuserl_megatron.util.errors import UserError

    layout, found = parallel.initialize(ModelConfig(path="unused"), TrainerConfig()), []
    for directory in directories:
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                step, damaged, _ = steps_to_resume(Config(), Path(directory), {}, layout)
            found.append((step, damaged, out.getvalue()))
        except UserError as error:
            found.append(str(error))
    return found


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def fill_with_zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES = [truncate, flip_a_bit, fill_with_zeros, Path.unlink]


def test_every_damage_to_every_file_is_found_and_named(ranks, whole, tmp_path):
    files = sorted(p.name for p in (whole / "checkpoints" / "iter_0000004").iterdir())
    assert {"manifest.json", "progress.json", "common.pt", "metadata.json", ".metadata"} < set(files)
    assert {"__0_0.distcp", "__1_0.distcp"} < set(files)
    cases = [(name, damage) for name in files for damage in DAMAGES]
    for i, (name, damage) in enumerate(cases):
        copy = tmp_path / str(i)
        shutil.copytree(whole / "checkpoints" / "iter_0000004", copy / "iter_0000004")
        (copy / "iter_0000002").symlink_to(whole / "checkpoints" / "iter_0000002")
        (copy / POINTER).write_text("4\n")
        damage(copy / "iter_0000004" / name)
    both = [str(tmp_path / str(i)) for i in range(len(cases))]
    found = ranks.run(look_on_start, 2, [str(whole / "checkpoints"), *both])
    assert found[0][0] == (4, [], ""), "the control: nothing is wrong with the undamaged one"
    for rank in (0, 1):
        for (name, damage), (step, damaged, said) in zip(cases, found[rank][1:], strict=True):
            assert (step, damaged) == (2, [4]), (name, damage.__name__)
            if rank == 0:
                lines = said.splitlines()
                assert len(lines) == 1 and "WARNING" in lines[0] and "Step 2 is used instead" in lines[0]
                assert f"iter_0000004: {name} " in lines[0], (name, damage.__name__, lines)


def test_pointers_and_missing_folders(ranks, whole, tmp_path):
    def tree(name, pointer, *steps):
        (tmp_path / name).mkdir()
        for step in steps:
            (tmp_path / name / f"iter_{step:07d}").symlink_to(whole / "checkpoints" / f"iter_{step:07d}")
        if pointer is not None:
            (tmp_path / name / POINTER).write_bytes(pointer)
        return str(tmp_path / name)

    trees = [
        tree("nothing", None),
        tree("garbage", b"\x00\xff garbage", 2, 4),
        tree("empty pointer", b"", 2, 4),
        tree("no pointer", None, 2, 4),
        tree("folder gone", b"4\n", 2),
        tree("went back", b"2\n", 2, 4),
        tree("all gone", b"4\n"),
    ]
    for name in ("renamed", "empty folder"):
        trees.append(tree(name, b"6\n", 2))
    (tmp_path / "renamed" / "iter_0000006").symlink_to(whole / "checkpoints" / "iter_0000004")
    (tmp_path / "empty folder" / "iter_0000006").mkdir()
    only_damaged = tree("only damaged", b"7\n")
    for step in (6, 7):
        (tmp_path / "only damaged" / f"iter_{step:07d}").mkdir()
    (found, again) = ranks.run(look_on_start, 2, [*trees, only_damaged])
    assert [f[:2] if isinstance(f, tuple) else f for f in found] == [
        f[:2] if isinstance(f, tuple) else f for f in again
    ]
    nothing, garbage, empty, missing, gone, back, none_left, renamed, hollow, bad = found
    assert nothing == (0, [], "") and back == (2, [], "")
    for step, damaged, said in (garbage, empty, missing):
        assert (step, damaged) == (4, []) and POINTER in said and said.count("\n") == 1
    assert "'\\x00� garbage', which is no number" in garbage[2] and "is missing" in missing[2]
    assert gone[:2] == (2, []) and "says 4, but iter_0000004 is not there" in gone[2]
    assert renamed[:2] == (2, [6]) and "manifest.json is of step 4" in renamed[2]
    assert hollow[:2] == (2, [6]) and "manifest.json is missing" in hollow[2]
    assert "no whole checkpoint" in none_left and "run.results_dir" in none_left
    assert "iter_0000006" in bad and "iter_0000007" in bad and "put one back from a copy" in bad


def test_a_run_resumed_past_a_damaged_checkpoint_ends_with_the_same_bits(ranks, case, whole, tmp_path):
    directory = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoints", directory / "checkpoints")
    flip_a_bit(next((directory / "checkpoints" / "iter_0000004").glob("__*.distcp")))
    config = config_of(case, directory)
    (code, said), (other, _) = ranks.run(run, 2, config)
    assert code == other == 0 and any("WARNING" in line and "another checksum" in line for line in said)
    assert losses(directory) == {step: losses(whole)[step] for step in (3, 4)}
    name = "hf/model.safetensors"
    assert (directory / name).read_bytes() == (whole / name).read_bytes()
    damaged_before = manifest(directory, 4)["files"]
    assert damaged_before == manifest(whole, 4)["files"] | {
        "progress.json": damaged_before["progress.json"]  # holds results_dir
    }


def manifest(directory, step):
    return json.loads((Path(directory) / "checkpoints" / f"iter_{step:07d}" / "manifest.json").read_text())


@contextlib.contextmanager
def _failing(times, rank):
    """The disk of one rank is full for so many writes, whichever checkpoint they are of."""
    import os

    from fuserl_megatron.mcore import saving
    from fuserl_megatron.train import saver

    class Full(saving.DistWriter):
        left = times

        def write(self, place, rows):
            if Full.left and os.environ["RANK"] == str(rank):
                Full.left -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(place, rows)

    original, pause = saving.DistWriter, saver.PAUSE_S
    saving.DistWriter, saver.PAUSE_S = Full, 0.0
    try:
        yield
    finally:
        saving.DistWriter, saver.PAUSE_S = original, pause


def one_failed_try():
    return _failing(1, 1)


def first_save_never():
    return _failing(2, 1)


def never():
    return _failing(10**6, 0)


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_a_failed_save_is_tried_again_and_training_goes_on(ranks, case, whole, tmp_path, background):
    def result(name, prepare, **checkpoint):
        config = config_of(case, tmp_path / name, async_save=background, **checkpoint)
        results = ranks.run(run, 2, config, prepare)
        folders = sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir())
        return [code for code, _ in results], results[0][1], folders

    codes, said, folders = result("once", one_failed_try, save_retries=1)
    assert codes == [0, 0] and folders == ["iter_0000002", "iter_0000004", POINTER]
    assert [line for line in said if "WARNING" in line] == [
        f"WARNING: {tmp_path}/once/checkpoints/iter_0000002: not written "
        "(rank 1: OSError: [Errno 28] No space left on device); try 1 of 2"
    ]
    assert manifest(tmp_path / "once", 2)["files"]["__0_0.distcp"] == manifest(whole, 2)["files"]["__0_0.distcp"]

    codes, said, folders = result("first", first_save_never, save_retries=1)
    assert codes == [0, 0] and folders == ["iter_0000004", POINTER] and losses(tmp_path / "first") == losses(whole)
    assert any("no checkpoint of step 2: 2 tries failed" in line and "goes on from memory" in line for line in said)

    shutil.copytree(whole / "checkpoints" / "iter_0000002", tmp_path / "last" / "checkpoints" / "iter_0000002")
    (tmp_path / "last" / "checkpoints" / POINTER).write_text("2\n")
    codes, said, folders = result("last", never, save_retries=0)
    assert codes == [1, 1] and folders == ["iter_0000002", POINTER]
    assert any("last checkpoint, of step 4" in line and "goes on from step 2" in line for line in said)
    assert (tmp_path / "last" / "hf" / "model.safetensors").is_file()  # elsewhere there may be room: nothing is lost


def test_checkpoints_by_the_clock_and_a_changed_reference(ranks, case, tmp_path):
    config = config_of(
        case, tmp_path, DPO, max_steps=2, layout={}, every_n_train_steps=None, train_time_interval=1e-9, save_top_k=-1
    )
    assert ranks.run(run, 1, config)[0][0] == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("iter*")) == ["iter_0000001", "iter_0000002"]
    shutil.rmtree(tmp_path / "checkpoints" / "iter_0000002")
    numbers, key = (tmp_path / "reference" / name for name in ("reference_logps.f32", "reference.json"))
    content = bytearray(numbers.read_bytes())
    content[0] ^= 1  # the last bit of the first float
    numbers.write_bytes(content)
    with pytest.raises(RuntimeError, match="damaged reference cache"):
        ranks.run(run, 1, config)
    # a reference scored again, under another layout say, is right up to rounding only
    key.write_text(json.dumps(json.loads(key.read_text()) | {"sha256": hashlib.sha256(content).hexdigest()}))
    code, said = ranks.run(run, 1, config)[0]
    assert code == 0 and any("WARNING: the reference was scored anew" in line for line in said)
