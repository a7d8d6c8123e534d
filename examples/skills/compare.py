"""Every method beside every other on the skills, over several seeds of the data order: the table of docs/results.md.

    python examples/skills/compare.py --dir runs/compare --seeds 1 2 3

One process a run (the layout does not change the numbers), two runs at a time. What is there already is not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from evaluate import HELDOUT, evaluate_model, read_jsonl  # noqa: E402

ONE_AT_A_TIME = threading.Lock()  # transformers must not load two models in two threads: one loses its tied weights
TEMPERATURE = 0.1
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 % quantile for that many runs

# found by search.py on other prompts and seeds: a rate near FuseSFT's, and an SFT term beside every preference loss
PO = ["optim.lr=3e-4", "objective.rpo_alpha=1"]
DPO = ["objective=fusepo_dpo", "objective.beta=0.1", *PO]

# name -> (start from, recipe, data set, settings)
METHODS = {
    "SFT(best)": ("target", "sft", "sft", ["data.reward_temperature=0"]),
    "uniform SFT": ("target", "sft", "sft", ["data.reward_temperature=inf"]),
    "FuseSFT": ("target", "sft", "sft", []),
    "FuseSFT + FusePO-DPO": ("FuseSFT", "po", "po", DPO),
    "FuseSFT + FusePO-SimPO": ("FuseSFT", "po", "po", ["objective=fusepo_simpo", "objective.beta=2", *PO]),
    "FuseSFT + FusePO-RLOO": ("FuseSFT", "po", "po", ["objective=fusepo_rloo", *PO, "optim.lr=1e-4"]),
    "FuseSFT + WRPO": ("FuseSFT", "po", "own", ["objective=wrpo", "objective.target_source=target", *PO]),
    "SFT(best) + DPO": ("SFT(best)", "po", "po", [*DPO, "data.reward_temperature=0"]),
    "FuseSFT + more FuseSFT": ("FuseSFT", "po", "po", ["objective=fusesft", "optim.lr=3e-4"]),
}


def call(log: Path, *arguments: str) -> None:
    """Run one `fuserl` command with its output in a file; stop everything when it fails."""
    with open(log, "a", encoding="utf-8") as out:
        code = subprocess.call([sys.executable, "-m", "fuserl_megatron.cli", *arguments], stdout=out, stderr=out)
    if code:
        raise SystemExit(f"compare: fuserl {' '.join(arguments)} ended with {code}; see {log}")


def build(output: Path, inputs: list[str]) -> Path:
    """Build a data set unless it is there."""
    if not (output / "manifest.json").exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        settings = [f"tokenizer={HERE / 'target'}", f"reward_temperature={TEMPERATURE}", f"output={output}"]
        call(output.parent / "build.log", "build", f"inputs=[{','.join(inputs)}]", *settings)
    return output


def own_samples(model: Path, output: Path, seed: int, num_samples: int = 4) -> Path:
    """The target's own responses to the FusePO prompts, scored by the rules, as a source called `target` (for WRPO)."""
    if output.exists():
        return output
    import torch
    from skills import reward
    from training import sample
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    files = sorted((HERE / "data").glob("train_po.*.jsonl"))
    prompts = list(dict.fromkeys(r["prompt"] for f in files for r in read_jsonl(f)))
    with ONE_AT_A_TIME:
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    partial = output.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as out:
        for _ in range(num_samples):
            for prompt, text in zip(prompts, sample(network, tokenizer, prompts, 0.9), strict=True):
                response = text.split(tokenizer.eos_token)[0].strip()
                if response:
                    record = dict(prompt=prompt, source="target", response=response, reward=reward(prompt, response))
                    out.write(json.dumps(record) + "\n")
    partial.rename(output)
    return output


def train_and_score(
    place: Path,
    name: str,
    recipe: str,
    start: Path,
    data: Path,
    seed: int,
    settings: list[str],
    prompts: Path = HELDOUT,
) -> tuple[Path, dict]:
    """Train one model and score its greedy answers to `prompts`, unless that is done; the model and its score."""
    directory = place / "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
    if not (directory / "score.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        call(
            place / "train.log", "train", f"--config-dir={HERE / 'conf'}", f"--config-name={recipe}",
            "model.tensor_model_parallel_size=1", f"run.results_dir={directory}", f"run.seed={seed}",
            f"model.path={start}", f"data.path={data}",
            "exp_manager.checkpoint_callback_params.every_n_train_steps=null", *settings,
        )  # fmt: skip
        with ONE_AT_A_TIME:
            score = evaluate_model(directory / "hf", prompts)
        (directory / "score.json").write_text(json.dumps(score))
    return directory / "hf", json.loads((directory / "score.json").read_text())


def one_seed(root: Path, seed: int, data: dict[str, Path], sft_epochs: int) -> dict[str, dict]:
    """Train and evaluate every method with one seed; returns the scores."""
    place, models, scores = root / f"seed{seed}", {"target": HERE / "target"}, {}
    for name, (start, recipe, which, settings) in METHODS.items():
        chosen = data.get(which) or build(
            place / "own", [f"{HERE}/data/train_po.*.jsonl", str(own_samples(models[start], place / "own.jsonl", seed))]
        )
        epochs = [f"trainer.max_epochs={sft_epochs}"] if recipe == "sft" else []
        models[name], scores[name] = train_and_score(
            place, name, recipe, models[start], chosen, seed, [*settings, *epochs]
        )
        print(f"seed {seed}: {name:28s} {100 * scores[name]['mean']:.1f}", flush=True)
    return scores


def table(results: dict[int, dict[str, dict]]) -> str:
    """Markdown: mean over the seeds with its 95 % interval (Student), and the difference to FuseSFT, seed by seed."""
    lines = ["| method | mean accuracy, % | by seed | minus FuseSFT, points |", "|---|---:|---|---:|"]
    for name in METHODS:
        values = [100 * r[name]["mean"] for r in results.values()]
        gains = [100 * (r[name]["mean"] - r["FuseSFT"]["mean"]) for r in results.values()]
        shown = " ".join(f"{v:.1f}" for v in values)
        lines.append(f"| {name} | {interval(values)} | {shown} | {interval(gains) if name != 'FuseSFT' else ''} |")
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    """Mean and half the width of its 95 % interval over the runs."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = STUDENT_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} +- {half:.1f}"


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="runs/compare", type=Path)
    parser.add_argument("--seeds", default=[1, 2, 3], type=int, nargs="+")
    parser.add_argument(
        "--sft-epochs", default=1, type=int, help="passes of the first stage (default: 1; the demo takes 2)"
    )
    options = parser.parse_args()
    root = options.dir.resolve()
    data = {stage: build(root / stage, [f"{HERE}/data/train_{stage}.*.jsonl"]) for stage in ("sft", "po")}
    with ThreadPoolExecutor(2) as pool:
        scores = list(pool.map(lambda seed: one_seed(root, seed, data, options.sft_epochs), options.seeds))
    print(table(dict(zip(options.seeds, scores, strict=True))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
