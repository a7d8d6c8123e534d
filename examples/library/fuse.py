"""The package as a library, cell by cell (VS Code, Jupyter with jupytext), or as a script.

The target and the scored responses are the demo's; two steps of each stage on the CPU take seconds. examples/skills is
the whole experiment.
"""

# %% What there is
import json
import os
from pathlib import Path

from fuserl_megatron import LOSSES, build, convert, evaluate, load_config, train

SKILLS = Path(__file__).resolve().parents[1] / "skills"
OUT = Path(os.environ.get("FUSERL_EXAMPLE", "library_example"))

for name, spec in LOSSES.items():
    print(f"{name:8} options {spec.defaults}")

# %% A data set from scored responses
manifest = build(
    load_config(
        "build",
        [
            f"inputs=[{SKILLS}/data/train_sft.01.jsonl]",
            f"output={OUT}/data",
            f"tokenizer={SKILLS}/target",
            "reward_temperature=0.1",
            "force=true",
        ],
    )
)
print({source: round(figures["mean_weight"], 3) for source, figures in manifest.per_source.items()})

# %% FuseSFT, then FusePO with the loss of the papers' best results
SETTINGS = [
    f"data.path={OUT}/data",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.max_steps=2",
    "data.seq_length=256",
    "data.micro_batch_size=4",
    "data.global_batch_size=8",
    "optim.lr=1e-4",
]
sft = train(load_config("train", [*SETTINGS, f"model.path={SKILLS}/target", f"run.results_dir={OUT}/fusesft"]))
preference = [*SETTINGS, "objective=fusepo_ln_dpo", f"objective.reference={sft}/hf"]
po = train(load_config("train", [*preference, f"model.path={sft}/hf", f"run.results_dir={OUT}/fusepo"]))
print([json.loads(line)["loss"] for line in (po / "metrics.jsonl").read_text().splitlines()])

# %% What it has done: the model after FusePO beside the one before
figures = evaluate(
    load_config("train", [*preference, f"model.path={po}/hf", f"run.results_dir={OUT}/evaluation"]), before=f"{sft}/hf"
)
for stage in ("fusesft", "fusepo"):
    before, after = figures["before"][stage]["loss"], figures[stage]["loss"]
    print(f"{stage}: loss {before:.4f} -> {after:.4f}")

# %% To a Megatron checkpoint, for tools that want one
print(convert(po / "hf", OUT / "megatron", to="megatron", force=True))
