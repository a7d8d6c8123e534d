"""Validation, best checkpoints, early stopping and run-time invariants, through the real training loop."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from fusion_case import DPO, LOSSES, SFT, make_case, make_config, run
from safetensors.torch import load_file

from fuserl_megatron.config.schema import CheckpointConfig, EarlyStoppingConfig
from fuserl_megatron.util.errors import UserError


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("held_out"), num_prompts=5, seed=9)["data"]


def with_validation(config, held_out, *, every=2, limit=None, patience=None, **checkpoint):
    manager = dataclasses.replace(
        config.exp_manager,
        checkpoint_callback_params=CheckpointConfig(**{"every_n_train_steps": 0, **checkpoint}),
        early_stopping_callback_params=EarlyStoppingConfig(patience=patience),
    )
    return dataclasses.replace(
        config,
        exp_manager=manager,
        trainer=dataclasses.replace(config.trainer, val_check_interval=every, limit_val_prompts=limit),
        data=dataclasses.replace(config.data, validation_path=held_out),
    )


def lines(directory, name):
    return [json.loads(line) for line in (Path(directory) / name).read_text().splitlines()]


def saved(directory):
    return sorted(int(p.name.removeprefix("iter_")) for p in (Path(directory) / "checkpoints").glob("iter_*"))


@pytest.mark.parametrize("objective", [SFT, LOSSES["kto"]], ids=["fusesft", "kto"])
def test_validation_is_the_same_under_every_layout_and_changes_nothing(ranks, case, held_out, tmp_path, objective):
    found = {}
    layouts = {"one": (1, {}), "dp2": (2, dict(packing=False, rows=3, seq_length=96)), "cp2": (2, dict(cp=2))}
    for name, (world, layout) in layouts.items():
        config = make_config(
            case, objective, max_steps=3, global_batch_size=3, results_dir=str(tmp_path / name), **layout
        )
        assert ranks.run(run, world, with_validation(config, held_out)) == [0] * world
        found[name] = lines(tmp_path / name, "validation.jsonl")
    assert [r["step"] for r in found["one"]] == [0, 2, 3] and found["one"][0]["val_prompts"] == 5
    for other in ("dp2", "cp2"):
        for one, two in zip(found["one"], found[other], strict=True):
            assert {k: v for k, v in one.items() if v is not None} == pytest.approx(
                {k: v for k, v in two.items() if v is not None}, rel=1e-4, abs=1e-5
            )
    plain = make_config(case, objective, max_steps=3, global_batch_size=3, results_dir=str(tmp_path / "plain"))
    assert ranks.run(run, 1, plain) == [0]
    assert not (tmp_path / "plain" / "validation.jsonl").exists()
    assert [r["loss"] for r in lines(tmp_path / "plain", "metrics.jsonl")] == [
        r["loss"] for r in lines(tmp_path / "one", "metrics.jsonl")
    ]


def to_hf(source, destination):
    from fuserl_megatron.convert import offline

    offline.megatron_to_hf(source, destination)


def test_the_best_checkpoint_is_kept_and_exported_and_early_stopping_survives_a_resume(ranks, case, held_out, tmp_path):
    directory = tmp_path / "run"
    # the larger the worse: training soon makes it smaller
    config = make_config(case, SFT, max_steps=8, global_batch_size=3, lr=0.05, results_dir=str(directory))
    config = with_validation(config, held_out, every=1, patience=2, monitor="val_loss", mode="max", save_top_k=1)
    assert ranks.run(run, 2, config) == [0, 0]
    history = {r["step"]: r["val_loss"] for r in lines(directory, "validation.jsonl")}
    best, last = max((s for s in history if s), key=history.get), max(history)
    assert history[best] > history[0] and last == best + 2 < 8  # two validations without a new best value
    assert saved(directory) == sorted({best, last})
    exported = load_file(directory / "hf" / "model.safetensors")
    ranks.run(to_hf, 1, str(directory / "checkpoints" / f"iter_{best:07d}"), str(tmp_path / "best"))
    expected = load_file(tmp_path / "best" / "model.safetensors")
    assert all(torch.equal(exported[n], expected[n]) for n in expected)
    (directory / "validation.jsonl").unlink()  # best value and patience are in the checkpoint
    assert ranks.run(run, 2, config) == [0, 0]  # the same command again: nothing more to do
    assert {r["step"]: r["val_loss"] for r in lines(directory, "validation.jsonl")} == history
    again = load_file(directory / "hf" / "model.safetensors")
    assert all(torch.equal(again[n], expected[n]) for n in expected)


def test_an_unknown_monitor_is_refused_with_the_nearest(ranks, case, held_out, tmp_path):
    config = with_validation(make_config(case, SFT, results_dir=str(tmp_path)), held_out, monitor="val_los")
    with pytest.raises(UserError, match="monitor=val_los: no such metric. Did you mean val_loss"):
        run(config)


def test_first_step_loss_is_checked_and_can_be_switched_off(ranks, case, tmp_path):
    def config(name, checks=()):
        config = make_config(case, DPO, max_steps=1, results_dir=str(tmp_path / name))
        return dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, disable_checks=checks),
            objective=dataclasses.replace(config.objective, reference=None),
        )

    assert ranks.run(run, 1, config("right")) == [0]
    # a cache of another model, which only the switched-off hash lets pass: the loss is then not log 2
    other = dataclasses.replace(config("wrong"), objective=make_config(case, DPO).objective)
    assert ranks.run(run, 1, other) == [0]
    for part in ("checkpoints", "hf"):
        shutil.rmtree(tmp_path / "wrong" / part)
    with pytest.raises(RuntimeError, match="another reference model"):
        ranks.run(run, 1, config("wrong"))
    assert ranks.run(run, 1, config("wrong", ("reference_hash",))) == [1]
    assert not (tmp_path / "wrong" / "hf").exists()
    assert ranks.run(run, 1, config("wrong", ("reference_hash", "first_step_loss"))) == [0]
