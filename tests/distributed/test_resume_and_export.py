"""Checkpoints and export: 2 + 2 steps equal 4 bit for bit, other layouts continue the same run, HF -> Megatron -> HF
is exact."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fusion_case import DPO, SFT, make_config, run
from plain_model import load_engine
from safetensors.torch import load_file


def losses(directory):
    rows = map(json.loads, (Path(directory) / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in rows}


def check_meters(directory):
    """Every step says what it did and where its time went, in parts that add up."""
    for line in (Path(directory) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        parts = {name: value for name, value in row.items() if name.startswith("seconds_")}
        assert sum(parts.values()) == pytest.approx(row["seconds"])
        assert all(parts[f"seconds_{name}"] > 0 for name in ("data", "forward_backward", "gradient_sync", "optimizer"))
        assert row["groups_per_second"] * row["real_tokens"] == pytest.approx(row["tokens_per_second"] * row["prompts"])
        assert row["model_tflops_per_device"] > 0 and "mfu" not in row  # a CPU has no peak in the table


def data_seen(directory):
    """What tells one global batch from another: prompts, tokens and responses scored, sources."""
    names = ("prompts", "real_tokens", "scored_tokens", "effective_number_of_sources", "epoch")
    rows = map(json.loads, (Path(directory) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: [row[name] for name in names] for row in rows}


def four_steps(ranks, case, directory, world, objective=SFT, **layout):
    config = make_config(
        case, objective, global_batch_size=3, max_steps=4, every=2, results_dir=str(directory), **layout
    )
    assert ranks.run(run, world, config) == [0] * world
    return config


def cut_back_to_step_two(source, destination):
    shutil.copytree(source, destination)
    checkpoints = Path(destination) / "checkpoints"
    shutil.rmtree(checkpoints / "iter_0000004")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2\n")
    shutil.rmtree(Path(destination) / "hf")
    (Path(destination) / "metrics.jsonl").unlink()


def weights(directory):
    return load_file(Path(directory) / "hf" / "model.safetensors")


OVERLAPPED = dict(distopt=True, overlap=True, sched="constant")


@pytest.mark.parametrize(
    "layout",
    [dict(tp=2), dict(distopt=True), dict(pp=2, precision="bf16"), OVERLAPPED, OVERLAPPED | {"precision": "bf16"}],
    ids=["tp2", "dp2 distopt", "pp2 bf16", "dp2 overlap", "dp2 overlap bf16"],
)
def test_two_plus_two_is_four_bit_for_bit(ranks, case, tmp_path, layout):
    config = four_steps(ranks, case, tmp_path / "whole", 2, **layout)
    cut_back_to_step_two(tmp_path / "whole", tmp_path / "resumed")
    four_steps(ranks, case, tmp_path / "resumed", 2, **layout)
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "resumed")
    assert sorted(resumed) == [3, 4]
    check_meters(tmp_path / "whole")
    assert all(resumed[s] == whole[s] for s in resumed)
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(actual[n], expected[n]) for n in expected)
    start = load_file(Path(config.model.path) / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert not torch.equal(start[name].to(expected[name].dtype), expected[name])


def test_overlapped_parameter_gather_exports_the_weights_of_the_last_step(ranks, case, tmp_path):
    """Core gathers updated shards in the next forward pass; a constant schedule makes the last step count."""
    four_steps(ranks, case, tmp_path / "plain", 2, sched="constant")
    four_steps(ranks, case, tmp_path / "overlap", 2, **OVERLAPPED)
    expected, actual = weights(tmp_path / "plain"), weights(tmp_path / "overlap")
    assert max((actual[n] - expected[n]).abs().max().item() for n in expected) < 1e-5


def test_going_back_to_an_older_step_keeps_what_is_written_then(ranks, case, tmp_path):
    config = four_steps(ranks, case, tmp_path / "run", 1)
    checkpoints = tmp_path / "run" / "checkpoints"
    for late in (7, 8):
        shutil.copytree(checkpoints / "iter_0000004", checkpoints / f"iter_{late:07d}")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2\n")
    assert ranks.run(run, 1, config) == [0]
    assert (checkpoints / "iter_0000004").is_dir()
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "4\n"


@pytest.mark.parametrize(
    "first,world,second,world2",
    [
        (dict(tp=2), 2, dict(pp=2), 2),
        (dict(tp=2, distopt=True), 4, dict(distopt=True), 2),
        (dict(distopt=True), 1, dict(distopt=True), 2),
        (dict(cp=2, distopt=True), 2, dict(distopt=True), 1),
        pytest.param(dict(tp=2), 2, dict(cp=2), 2, marks=pytest.mark.slow),
        pytest.param(dict(pp=2, vpp=2), 2, dict(tp=2), 2, marks=pytest.mark.slow),
        (dict(pp=2, distopt=True), 2, dict(pp=2, vpp=2, distopt=True), 2),
        (dict(tp=2, distopt=True), 2, dict(tp=2, pp=2, distopt=True), 4),
    ],
    ids=[
        "tp2 to pp2",
        "tp2 dp2 to dp2",
        "dp1 to dp2",
        "cp2 distopt to one",
        "tp2 to cp2",
        "pp2 vpp2 to tp2",
        "pp2 distopt to vpp2",
        "2 to 4 ranks",
    ],
)
def test_another_layout_continues_the_run(ranks, case, tmp_path, first, world, second, world2):
    four_steps(ranks, case, tmp_path / "whole", world, objective=DPO, **first)
    cut_back_to_step_two(tmp_path / "whole", tmp_path / "resumed")
    four_steps(ranks, case, tmp_path / "resumed", world2, objective=DPO, **second)
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "resumed")
    for step in (3, 4):
        assert resumed[step] == pytest.approx(whole[step], rel=2e-5)
        assert resumed[step][0] == pytest.approx(whole[step][0], abs=1e-6)
    expected, actual = data_seen(tmp_path / "whole"), data_seen(tmp_path / "resumed")
    assert actual == {step: expected[step] for step in (3, 4)} and expected[3] != expected[4]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_hf_to_megatron_to_hf_is_exact(ranks, tmp_path, tie, tp, pp):
    from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model

    source = tmp_path / "source"
    save_tiny_model(source, vocab_size=151, tie_word_embeddings=tie, num_key_value_heads=2)
    save_char_tokenizer(source)
    ranks.run(there_and_back, tp * pp, str(source), str(tmp_path / "back"), tp, pp)
    expected, actual = (load_file(d / "model.safetensors") for d in (source, tmp_path / "back"))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[n], actual[n]) for n in expected)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def there_and_back(source, destination, tp, pp):
    from fuserl_megatron.mcore import weights

    engine = load_engine(source, tp, pp)
    weights.export_hf(engine.target, engine.layout, destination, source_dir=source, lineage={"target": source})


def test_a_run_is_made_longer_by_the_same_command(ranks, case, tmp_path):
    """Two steps, then four in the same folder: with a schedule that does not depend on the end, the bits of four."""

    def steps(directory, number):
        config = make_config(
            case, SFT, global_batch_size=3, max_steps=number, every=2, results_dir=str(directory), sched="constant"
        )
        return ranks.run(run, 1, config)

    assert steps(tmp_path / "whole", 4) == [0]
    assert steps(tmp_path / "longer", 2) == [0]
    assert steps(tmp_path / "longer", 4) == [0]
    assert losses(tmp_path / "longer") == losses(tmp_path / "whole")
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "longer")
    assert all(torch.equal(actual[n], expected[n]) for n in expected)
    with pytest.raises(Exception, match="holds step 4, and the run is to have 3 steps: set trainer.max_steps to 4"):
        steps(tmp_path / "longer", 3)
