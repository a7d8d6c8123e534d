"""`make demo`: build -> FuseSFT -> FusePO -> export -> evaluate on held-out prompts, beside the two obvious baselines.

Everything is done by the `fuserl` command line as a user would type it; each command is printed before it runs. The
training settings are in conf/ beside this file.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

ROWS = {
    "best": "best-single-source SFT",
    "uniform": "uniform fusion",
    "fusesft": "FuseSFT",
    "fusepo": "FuseSFT+FusePO",
}
TEMPERATURE = 0.1


def fuserl(*arguments: str) -> None:
    """Run one command line and stop the demo when it fails."""
    print("\n$ fuserl " + " ".join(shlex.quote(a) for a in arguments), flush=True)
    code = subprocess.call([sys.executable, "-m", "fuserl_megatron.cli", *arguments])
    if code:
        sys.exit(code)


def build(output: Path, stage: str, *extra: str) -> dict:
    """Build one data set from the committed responses of a stage; returns its manifest."""
    inputs = f"inputs=[{HERE / 'data'}/train_{stage}.*.jsonl]"
    fuserl(
        "build", inputs, f"output={output}", f"tokenizer={HERE / 'target'}", f"reward_temperature={TEMPERATURE}", *extra
    )
    return json.loads((output / "manifest.json").read_text())


def train(root: Path, name: str, recipe: str, model: Path, data: Path, ranks: int, *extra: str) -> Path:
    """Train one model and return its Hugging Face directory."""
    fuserl(
        "train",
        "--nproc",
        str(ranks),
        f"--config-dir={HERE / 'conf'}",
        f"--config-name={recipe}",
        f"run.name={name}",
        f"run.results_dir={root / name}",
        f"model.path={model}",
        f"data.path={data}",
        *extra,
    )
    return root / name / "hf"


def main() -> int:
    """Run the experiment; returns 0 when the fused model beats every source and the best-single-source baseline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="demo", type=Path, help="where everything is written (default: demo)")
    parser.add_argument("--nproc", default=2, type=int, help="ranks; tensor parallel 2 (default: 2)")
    parser.add_argument("--seed", default=1234, type=int, help="seed of the data order (default: 1234)")
    options = parser.parse_args()
    root, started = options.dir.resolve(), time.monotonic()
    if root.exists():
        if not (root / "demo.json").exists() and any(root.iterdir()):
            print(f"fuserl: error: {root} is not empty and no earlier demo: choose another --dir", file=sys.stderr)
            return 2
        shutil.rmtree(root)
    root.mkdir(parents=True)
    (root / "demo.json").write_text("{}\n")

    manifest = build(root / "data_sft", "sft")
    build(root / "data_po", "po")
    best = max(manifest["per_source"], key=lambda s: manifest["per_source"][s]["mean_reward"])
    build(root / "data_best", "sft", f"sources=[{best}]")

    target, seed = HERE / "target", f"run.seed={options.seed}"
    models = {"target before": target}
    models["best"] = train(root, "best", "sft", target, root / "data_best", options.nproc, seed)
    models["uniform"] = train(
        root, "uniform", "sft", target, root / "data_sft", options.nproc, seed, "data.reward_temperature=inf"
    )
    models["fusesft"] = train(root, "fusesft", "sft", target, root / "data_sft", options.nproc, seed)
    models["fusepo"] = train(root, "fusepo", "po", models["fusesft"], root / "data_po", options.nproc, seed)
    return report(root, models, best, time.monotonic() - started)


def report(root: Path, models: dict[str, Path], best: str, seconds: float) -> int:
    """Evaluate by transformers from the exported directories, print the table, draw the plot, judge."""
    import torch
    from evaluate import evaluate_model, evaluate_sources, paired_difference
    from report import draw_plot, print_table

    torch.set_num_threads(2)
    print(f"\nevaluating with transformers on the held-out prompts (training took {seconds:.0f} s)\n", flush=True)
    scores = {f"source {name}": score for name, score in evaluate_sources().items()}
    scores |= {ROWS.get(name, name): evaluate_model(path) for name, path in models.items()}
    print_table(scores)
    draw_plot(scores, root / "results.png")
    keep = {name: {k: v for k, v in score.items() if k != "right"} for name, score in scores.items()}
    (root / "demo.json").write_text(json.dumps({"best_source": best, "scores": keep}, indent=2) + "\n")
    fused, won = scores[ROWS["fusepo"]], True
    for name, other in scores.items():
        if name == ROWS["fusepo"]:
            continue
        difference, half = paired_difference(fused, other)
        won &= difference > half or name in (ROWS["fusesft"], ROWS["uniform"])
        print(f"FuseSFT+FusePO - {name:24s} {100 * difference:+6.1f} points (95 % interval +- {100 * half:.1f})")
    print(f"\nfused model  {models['fusepo']}\nplot         {root / 'results.png'}\nfigures      {root / 'demo.json'}")
    if not won:
        print("the fused model is NOT above every source and the best-single-source baseline by more than the interval")
    return 0 if won else 1


if __name__ == "__main__":
    sys.exit(main())
