"""Eight trials of the crash harness, and the mistakes that it must notice."""

import dataclasses
import math

import crash
import pytest
from fleet import records


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("crash")


def test_eight_killed_runs_are_equal_to_undisturbed_ones(fleet, case, root):
    assert crash.run_trials(fleet, case, root, runs=8, seed=1) == []


@pytest.mark.slow
def test_killed_runs_of_an_adapter_are_equal_to_undisturbed_ones(fleet, case, tmp_path, monkeypatch):
    lora = ["adapter=lora", "adapter.rank=4", "optim.lr=1e-2"]
    layouts = {f"lora {name}": [*words, *lora] for name, words in crash.LAYOUTS.items()}
    monkeypatch.setattr(crash, "LAYOUTS", layouts)
    assert crash.run_trials(fleet, case, tmp_path, runs=4, seed=3) == []


def forget_the_optimizer(rank):
    from fuserl_megatron.mcore import checkpoint

    def anew(optimizer, state):
        for part in optimizer.chained_optimizers:
            part.optimizer.state.clear()

    checkpoint._load_optimizer = anew


def test_a_resume_without_the_optimizers_state_is_noticed(fleet, case, root, tmp_path):
    directory = root / "tp2"  # the undisturbed run of the test before
    expected = crash.undisturbed(fleet, case, tmp_path / "whole", "tp2") if not directory.exists() else None
    directory = directory if expected is None else tmp_path / "whole"
    steps, weights = crash.result(directory)
    words = crash.overrides(case, tmp_path, "tp2", False)
    run = fleet.start(words, tmp_path / "log")
    run.until(lambda: len(records(tmp_path / "run", whole=False)) >= 3)
    run.kill()
    assert fleet.start(words, tmp_path / "log", prelude=forget_the_optimizer).wait(60) == [0, 0]
    found = crash.problems(crash.Undisturbed(steps, weights, 0.0, []), tmp_path)
    assert len(found) == 2 and found[0].startswith("other losses") and found[1] == "other weights"


def test_the_last_bit_of_a_loss_counts(tmp_path, monkeypatch):
    steps = [(1, 2.5, 1.0, 1e-3), (2, 2.25, 1.0, 1e-3)]
    monkeypatch.setattr(crash, "result", lambda directory: (steps, b"weights"))
    right = crash.Undisturbed(list(steps), b"weights", 1.0, [])
    assert crash.problems(right, tmp_path) == []
    other = [steps[0], (2, math.nextafter(2.25, 3.0), 1.0, 1e-3)]
    assert "other losses" in crash.problems(dataclasses.replace(right, steps=other), tmp_path)[0]
    assert "has steps [1, 2]" in crash.problems(dataclasses.replace(right, steps=[*steps, steps[1]]), tmp_path)[0]
    (tmp_path / "run" / "checkpoints" / ".iter_0000001.ab.partial").mkdir(parents=True)
    assert "left over" in crash.problems(right, tmp_path)[0]
