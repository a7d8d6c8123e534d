"""LoRA: loss and gradients are those of `peft` in float64 (<= 1e-5) under every layout; the model without its adapter
is the reference; a checkpoint holds the adapter alone and goes on bit for bit; what is exported is what `peft` and
transformers compute."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from fusion_case import DPO, LOSSES, SFT, several, worst_relative_error
from lora_case import LORA, hf_model, lora_twins, make_lora_config, peft_model, save_adapter
from test_layouts import BOUND, compare, planted
from test_resume_and_export import cut_back_to_step_two, losses

from fuserl_megatron.convert.peft import all_factors, layer_parameters
from fuserl_megatron.util.errors import UserError

OBJECTIVES = {"fusesft": SFT, "dpo": DPO, "rloo": LOSSES["rloo"], "wrpo": LOSSES["wrpo"]}
LAYOUTS = {
    "tp2 sp": (dict(tp=2, sp=True), 2),
    "tp2 pp2 sp, full recompute": (dict(tp=2, pp=2, sp=True, recompute="full"), 4),
    "dp2": (dict(), 2),
    "cp2": (dict(cp=2), 2),
    "pp2 vpp2": (dict(pp=2, vpp=2), 2),
}
MORE_LAYOUTS = {
    "one": (dict(), 1),
    "tp2": (dict(tp=2), 2),
    "pp2": (dict(pp=2), 2),
    "tp2 pp2": (dict(tp=2, pp=2), 4),
    "tp2 pp2 vpp2 sp, selective recompute": (dict(tp=2, pp=2, vpp=2, sp=True, recompute="selective"), 4),
    "cp2 tp2 sp": (dict(cp=2, tp=2, sp=True), 4),
    "dp2, distributed optimizer, overlap": (dict(distopt=True, overlap=True), 2),
    "prefix shared, full recompute": (dict(share="on", seq_length=240, recompute="full"), 1),
}


@pytest.fixture(scope="module")
def adapter(case, tmp_path_factory):
    return save_adapter(case["policy"], tmp_path_factory.mktemp("peft") / "adapter")


@pytest.fixture(scope="module")
def expected(case, adapter):
    return lora_twins(case, OBJECTIVES, adapter)


@pytest.mark.parametrize(
    "changes, world",
    [*LAYOUTS.values(), *(pytest.param(*layout, marks=pytest.mark.slow) for layout in MORE_LAYOUTS.values())],
    ids=[*LAYOUTS, *MORE_LAYOUTS],
)
def test_layout_parity(ranks, case, adapter, expected, changes, world):
    """All losses in one job: only the loss differs."""
    configs = [make_lora_config(case, objective, adapter, **changes) for objective in OBJECTIVES.values()]
    by_rank = ranks.run(several, world, configs, "unused")
    for name, *results in zip(OBJECTIVES, *by_rank, strict=True):
        compare(results, expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj",), ("up_proj", "o_proj"), ("down_proj",)])
def test_some_targets_of_a_fused_layer(ranks, case, tmp_path, targets):
    adapter = save_adapter(case["policy"], tmp_path / "adapter", target_modules=list(targets), use_rslora=True)
    lora = dataclasses.replace(LORA, targets=targets, use_rslora=True)
    config = make_lora_config(case, SFT, adapter, lora=lora, tp=2, sp=True, recompute="full")
    compare([r[0] for r in ranks.run(several, 2, [config], "unused")], lora_twins(case, {"x": SFT}, adapter)["x"])


@pytest.mark.parametrize(
    "fault, changes",
    [("lora_gradient_not_summed", dict(tp=2)), ("lora_factor_not_marked", dict(tp=2, sp=True))],
)
def test_negative_controls_break_the_bound(ranks, case, adapter, expected, fault, changes):
    config = make_lora_config(case, SFT, adapter, **changes)
    grads = ranks.run(planted, 2, fault, [config], "unused")[0][0][3]
    error = worst_relative_error(grads, expected["fusesft"][1])
    print(fault, error)
    assert error > 100 * BOUND


def test_the_model_without_its_adapter_is_the_reference(ranks, case, adapter, tmp_path):
    modes = ("cache", "adapter", "resident", "swap")
    configs = [make_lora_config(case, DPO, adapter, mode, tp=2) for mode in modes]
    configs.append(make_lora_config(case, DPO, adapter, tp=2))
    stored, *others = ranks.run(several, 2, configs, str(tmp_path / "reference"))[0]
    assert (tmp_path / "reference").exists()
    for other in others:
        assert other[0] == pytest.approx(stored[0], rel=1e-6)
        assert worst_relative_error(other[3], stored[3]) <= BOUND
    assert others[-1][:3] == others[0][:3]  # null is adapter
    assert stored[1]["kl_to_reference"] != 0


def test_before_the_first_step(ranks, case):
    """Gradients and states are the adapter's alone, as many as `fuserl plan` counts; its first values are those of a
    function of name and seed."""
    from fuserl_megatron.convert.hf_config import read_config
    from fuserl_megatron.mcore.lora import first_value

    config = make_lora_config(case, SFT, None, tp=2, pp=2, distopt=True)
    shape = read_config(case["policy"])
    cut, whole = layer_parameters(shape, LORA)
    per_rank = 2 * (cut // 2 + whole)  # 4 layers over 2 stages
    found = ranks.run(kept_numbers, 4, config)
    assert [numbers for *numbers, _ in found] == [[per_rank, per_rank]] * 4
    expected = {factor.name: first_value(factor, config.run.seed) for factor in all_factors(shape, LORA)}
    actual = found[0][2]
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def kept_numbers(config):
    from fuserl_megatron.mcore import lora, parallel
    from fuserl_megatron.train import feed

    config, shape, (dataset,) = feed.open_run(config, [config.data.path])
    layout = parallel.initialize(config.model, config.trainer)
    engine = feed.with_optimizer(config, feed.make_engine(config, layout, shape, dataset.sources))
    buffered = sum(stop - start for b in engine.wrapped[0].buffers for start, stop, _ in b.param_index_map.values())
    stepped = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    return buffered, stepped, lora.gather_adapters(engine.target, layout)


def train(config):
    from fuserl_megatron.train.loop import train

    return train(config)


@pytest.mark.parametrize(
    "changes",
    [
        dict(tp=2, sp=True),
        pytest.param(dict(distopt=True, overlap=True, precision="bf16"), marks=pytest.mark.slow),
        pytest.param(dict(pp=2, vpp=2, distopt=True), marks=pytest.mark.slow),
    ],
    ids=["tp2 sp", "dp2 overlap bf16", "pp2 vpp2 distopt"],
)
def test_two_plus_two_is_four_and_what_is_exported(ranks, case, tmp_path, changes):
    """Four steps with a merged model at the end; then from step 2 on again, with an adapter directory at the end."""
    base = shutil.copytree(case["policy"], tmp_path / "base")
    paths = case | {"policy": str(base)}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    common = dict(global_batch_size=3, max_steps=4, every=2, lr=1e-2) | changes
    config = make_lora_config(paths, DPO, None, results_dir=str(whole), **common)
    assert ranks.run(train, 2, config) == [0, 0]
    check_checkpoint_keys(whole / "checkpoints" / "iter_0000004", base)
    cut_back_to_step_two(whole, resumed)
    again = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, results_dir=str(resumed)),
        adapter=dataclasses.replace(config.adapter, export="adapter"),
    )
    assert ranks.run(train, 2, again) == [0, 0]
    after, before = losses(resumed), losses(whole)
    assert sorted(after) == [3, 4] and all(after[step] == before[step] for step in after)

    tokens = torch.randint(0, 100, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        merged = hf_model(whole / "hf")(tokens).logits
        loaded = peft_model(base, resumed / "adapter")(tokens).logits
        start = hf_model(base)(tokens).logits
    moved = (merged - start).abs().max()
    tolerance = 1e-5 if changes.get("precision") is None else 5e-2  # the merged sum is rounded to bf16 once
    assert (merged - loaded).abs().max() <= tolerance * max(1, merged.abs().max()) and moved > 1e-2
    assert not (resumed / "hf").exists()
    fields = json.loads((resumed / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["base_model_name_or_path"]) == (3, 5.0, str(base))
    check_a_changed_base_is_refused(again, base)


def check_checkpoint_keys(folder, base):
    """The adapter and its states; of the model nothing."""
    from fuserl_megatron.checkpoint.reader import DistReader
    from fuserl_megatron.convert.hf_config import read_config
    from fuserl_megatron.convert.megatron_checkpoint import check_checkpoint

    shape = read_config(base)
    names = {f"adapters.{factor.name}" for factor in all_factors(shape, LORA)}
    with DistReader(folder) as reader:
        keys = {key for key in reader.keys if "adapters" in key}
        assert names <= keys and all(key.removeprefix("optimizer.state.") for key in keys)
        rest = {key for key in reader.keys if not key.endswith(tuple(names))}
        assert not any("weight" in key for key in rest), rest
        with pytest.raises(UserError, match="holds a LoRA adapter alone"):
            check_checkpoint(reader, shape)


def check_a_changed_base_is_refused(config, base):
    from fuserl_megatron.data.dataset import FusedDataset
    from fuserl_megatron.train import resume

    def progress():
        identity = resume.run_identity(config, FusedDataset(config.data.path), 0.05, 4)
        identity = {k: v for k, v in identity.items() if k.startswith(("adapter", "model"))}
        return resume._progress_of_this_run(Path(config.run.results_dir, "checkpoints"), 4, identity)

    assert progress()["adapter"]["rank"] == 3
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="belongs to a run on other weights than those in model.path now"):
        progress()


@pytest.mark.slow
@pytest.mark.parametrize(
    "first, second, world2",
    [(dict(tp=2, sp=True, distopt=True), dict(pp=2, distopt=True), 2), (dict(pp=2, vpp=2), dict(cp=2), 2)],
    ids=["tp2 to pp2", "pp2 vpp2 to cp2"],
)
def test_another_layout_continues_the_run(ranks, case, tmp_path, first, second, world2):
    common = dict(global_batch_size=3, max_steps=4, every=2)
    whole = make_lora_config(case, DPO, None, results_dir=str(tmp_path / "whole"), **common, **first)
    assert ranks.run(train, 2, whole) == [0, 0]
    cut_back_to_step_two(tmp_path / "whole", tmp_path / "resumed")
    again = make_lora_config(case, DPO, None, results_dir=str(tmp_path / "resumed"), **common, **second)
    assert ranks.run(train, world2, again) == [0] * world2
    expected, actual = losses(tmp_path / "whole"), losses(tmp_path / "resumed")
    for step in (3, 4):
        assert actual[step] == pytest.approx(expected[step], rel=2e-5)


@pytest.mark.slow
def test_parity_and_evaluation_know_the_adapter(ranks, case, adapter, tmp_path):
    from fuserl_megatron.proofs.parity import parity
    from fuserl_megatron.train.evaluate import evaluate

    config = make_lora_config(case, DPO, adapter, tp=2, results_dir=str(tmp_path / "with"))
    assert 0 in ranks.run(parity, 2, config)
    assert ranks.run(evaluate, 2, config, case["policy"]) == [0, 0]
    merged = peft_model(case["policy"], adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(case["policy"], name), tmp_path / "merged" / name)
    plain = dataclasses.replace(
        config,
        adapter=dataclasses.replace(config.adapter, kind="none", path=None),
        run=dataclasses.replace(config.run, results_dir=str(tmp_path / "without")),
        model=dataclasses.replace(config.model, path=str(tmp_path / "merged")),
        objective=dataclasses.replace(config.objective, reference=case["policy"]),
    )
    assert ranks.run(evaluate, 2, plain, case["policy"]) == [0, 0]
    found = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("with", "without")]
    for stage in ("fusesft", "fusepo"):
        assert found[0][stage] == pytest.approx(found[1][stage], rel=1e-4, abs=1e-5)
        assert found[0]["before"][stage] == pytest.approx(found[1]["before"][stage], rel=1e-5, abs=1e-6)
        assert found[0][stage]["loss"] != pytest.approx(found[0]["before"][stage]["loss"], rel=1e-2)
