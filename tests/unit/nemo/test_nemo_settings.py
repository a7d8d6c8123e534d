"""NeMo-Aligner's files: every key of a whole SFT and a whole DPO file has a fate, and what comes out loads and says the
same."""

from pathlib import Path

import pytest
import yaml

from fuserl_megatron.cli import main
from fuserl_megatron.config.keys import all_keys
from fuserl_megatron.config.load import load_config
from fuserl_megatron.config.schema import Config
from fuserl_megatron.nemo.keys import ANY, TABLE
from fuserl_megatron.nemo.settings import convert, remaining_problem
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import show

ROOT = Path(__file__).resolve().parents[3]
ASSETS = ROOT / "tests" / "assets" / "nemo"
PLACES = ["model.path=/m", "data.path=/d", "data.validation_path=/v"]


def fates(kind):
    settings, found = convert(ASSETS / f"{kind}.yaml")
    return settings, {fate.nemo: fate for fate in found}


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_every_key_of_the_file_has_one_fate(kind):
    expected = sorted(leaves(yaml.safe_load((ASSETS / f"{kind}.yaml").read_text())))
    _, found = convert(ASSETS / f"{kind}.yaml")
    assert sorted(fate.nemo for fate in found) == expected and len(expected) > 60
    assert all(fate.why for fate in found)


def test_sft():
    settings, by_key = fates("sft")
    unsupported = {key for key, fate in by_key.items() if fate.status == "unsupported"}
    assert unsupported == {
        "model.restore_from_path",
        "model.hidden_dropout",
        "model.data.train_ds.file_path",
        "model.data.validation_ds.file_path",
        "model.optim.sched.constant_steps",
        "model.my_own_invention",
    }
    assert remaining_problem(settings) is None


def test_dpo():
    settings, by_key = fates("dpo")
    unsupported = {key: fate.why for key, fate in by_key.items() if fate.status == "unsupported"}
    assert set(unsupported) == {
        "trainer.dpo.val_check_interval",
        "trainer.dpo.limit_val_batches",
        "pretrained_checkpoint.restore_from_path",
        "model.peft.lora_tuning.target_modules",
        "model.data.seq_length",
        "model.data.data_prefix.train",
        "model.data.data_prefix.validation",
        "model.data.data_prefix.test",
    }
    assert "encoder_seq_length" in unsupported["model.data.seq_length"]  # stands in the .nemo file
    assert "0.1" in unsupported["trainer.dpo.val_check_interval"]
    assert settings["objective"] == {"stage": "fusepo", "loss": "ln_dpo", "beta": 0.2, "rpo_alpha": 0.5}
    assert settings["adapter"] == {"kind": "lora", "rank": 32}
    assert settings["trainer"]["gradient_clip_val"] == 0.0
    assert settings["exp_manager"]["max_time_per_run"] == "00:03:50:00"
    assert by_key["exp_manager.wandb_logger_kwargs.project"].status == "ignored"


@pytest.mark.parametrize(("kind", "directory"), [("sft", "/lustre/experiments/llama8b_sft"), ("dpo", "/results")])
def test_the_command_prints_a_file_that_loads(kind, directory, tmp_path, capsys):
    assert main(["nemo-config", str(ASSETS / f"{kind}.yaml")]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    config = load_config("train", PLACES, config_name=str(file))
    assert config.run.results_dir == directory
    assert (config.data.global_batch_size, config.optim.betas, config.optim.sched.min_lr) == (64, (0.9, 0.98), 9e-7)
    with pytest.raises(UserError, match="model.path: required and not set"):
        load_config("train", [], config_name=str(file))


def change(tmp_path, kind, old, new):
    text = (ASSETS / f"{kind}.yaml").read_text()
    assert old in text
    (tmp_path / "changed.yaml").write_text(text.replace(old, new))
    return tmp_path / "changed.yaml"


@pytest.mark.parametrize(
    ("old", "new", "key", "status", "part"),
    [
        (
            "preference_loss: dpo",
            "preference_loss: rpo_sq",
            "model.dpo.preference_loss",
            "unsupported",
            "only dpo, ipo",
        ),
        (
            "preference_loss: dpo",
            "preference_loss: ipo",
            "model.dpo.preference_loss",
            "mapped",
            "length_normalized=true",
        ),
        ("probs: ${.", "probs: false # ${.", "model.dpo.sft_average_log_probs", "unsupported", "not a sum"),
        ("sft_loss_weight: 0.5", "sft_loss_weight: 0", "model.dpo.sft_loss_weight", "ignored", "no SFT term"),
        (
            "preference_loss_weight: 1",
            "preference_loss_weight: 2",
            "model.dpo.preference_loss_weight",
            "unsupported",
            "",
        ),
        ("precision: bf16-mixed", "precision: 16", "trainer.precision", "unsupported", "fp16"),
        ("name: distributed_fused_adam", "name: fused_adam", "model.optim.name", "mapped", "optimizer=false"),
        ("CosineAnnealing", "SquareAnnealing", "model.optim.sched.name", "unsupported", ""),
        ("eod_mask_loss: False", "eod_mask_loss: True", "model.data.eod_mask_loss", "unsupported", "scored"),
        ("limit_val_batches: 1\n", "limit_val_batches: 1.0\n", "trainer.dpo.limit_val_batches", "ignored", "reads all"),
    ],
)
def test_single_values(tmp_path, old, new, key, status, part):
    _, found = convert(change(tmp_path, "dpo", old, new))
    (fate,) = (fate for fate in found if fate.nemo == key)
    assert fate.status == status and part in fate.why, fate


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    for text, words in (("a: [1", "is no yaml file"), ("- 1", "holds no settings"), ("trainer: {ppo: 1}", "neither")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match="^[^\n]*$") as caught:
            convert(tmp_path / "bad.yaml")
        assert words in str(caught.value)
    with pytest.raises(UserError, match="trainer.dpo.max_steps says 600 and trainer.max_steps 5; leave one out"):
        convert(change(tmp_path, "dpo", "max_steps: ${.dpo.max_steps}", "max_steps: 5"))
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    with pytest.raises(UserError) as caught:
        convert(change(tmp_path, "dpo", "name: gpt_dpo", "name: ${oc.env:WANDB_API_KEY}"))
    assert "$WANDB_API_KEY" in str(caught.value) and "canary" not in str(caught.value)


def test_the_table_names_keys_that_exist_once_each():
    names = [row.nemo for row in TABLE]
    assert len(set(names)) == len(names) > 120
    assert {row.ours for row in TABLE if row.ours} <= set(all_keys(Config))


def markdown() -> str:
    """The table of docs/nemo.md."""
    lines = ["| NeMo-Aligner | here | remark |", "|---|---|---|"]
    for row in TABLE:
        here = f"`{row.ours}`" if row.ours else "ignored" if row.values == ANY else "unsupported"
        remark = [row.note] if row.note else []
        if row.ours and isinstance(row.values, dict):
            remark.insert(0, ", ".join(f"{show(k)} → {show(v)}" if k != v else show(k) for k, v in row.values.items()))
        elif row.ours is None and row.values != ANY and row.values:
            here = f"ignored when {' or '.join(dict.fromkeys(show(v) for v in row.values))}, otherwise unsupported"
        lines.append(f"| `{row.nemo}` | {here} | {'; '.join(remark)} |")
    return "\n".join(lines) + "\n"


def test_the_docs_show_the_table():
    assert markdown() in (ROOT / "docs" / "nemo.md").read_text(encoding="utf-8")
