"""Groups per second against TRL on the CPU: FuseSFT beside SFTTrainer, FusePO-DPO beside DPOTrainer.

    python benchmarks/vs_trl.py --json vs_trl.json --plot vs_trl.png

Both train the same tiny Llama (fp32, random weights) on the same sequences and pairs of the same groups, each in one
process with as many threads, in turns. TRL gets its trainer as it comes but for what would cost it time: no gradient
checkpointing, no logging, one large batch a step, and (DPO) its reference log-probabilities computed before training,
as ours are; `dpo_live` is TRL as it comes, scoring the reference every step. SFTTrainer runs padded and padding-free,
and the faster one counts. (TRL has no weights of sequences or pairs: it trains on them unweighted.)

    demo   the groups of examples/skills and the demo's own model: 3 sources, short prompts, short responses
    long   prompt : response 4 : 1 (160 : 40 tokens), 4 sources with 2 responses each: FuseSFT takes 4 of the 8, DPO all
"""

import argparse
import sys
import tempfile
from pathlib import Path

from _cases import DPO, SFT, Trainer, add_common_options, prepare_case, run_config, write_up
from _turns import Requests, ratio, take_turns

CASES = ("demo", "long")
GOALS = {("demo", "dpo"): 1.5, ("long", "dpo"): 2.0}
LAYOUT = {
    "demo": dict(seq_length=256, rows=4, prompts=24),  # as examples/skills/conf has it
    "long": dict(seq_length=1024, rows=1, prompts=8),
}
PROMPTS = {"demo": 24, "long": 8}


def settings(root: Path, case: str, objective: str):
    """Our run."""
    return run_config(root, SFT if objective.startswith("sft") else DPO, **LAYOUT[case])


def sequences(config) -> tuple[list[dict], int]:
    """What TRL trains on, and from how many groups: the sequences, or the pairs, that our sampler hands out."""
    from fuserl_megatron.config.objective import with_loss_defaults
    from fuserl_megatron.data.dataset import FusedDataset
    from fuserl_megatron.data.pairs import prepare as select

    config = with_loss_defaults(config)
    data = FusedDataset(config.data.path)
    prepared = select(data, config.objective, None)
    rows = []
    for i, group in enumerate(prepared.group_ids.tolist()):
        prompt = data.prompt(group).tolist()
        first, last = prepared.sequence_offsets[i : i + 2].tolist()
        tokens = [data.response(group, int(prepared.response_ids[n])).tolist() for n in range(first, last)]
        if config.objective.stage == "fusesft":
            rows += [dict(input_ids=prompt + t, labels=[-100] * len(prompt) + t) for t in tokens]
            continue
        for p in range(*prepared.pair_offsets[i : i + 2].tolist()):
            chosen, rejected = tokens[int(prepared.chosen[p])], tokens[int(prepared.rejected[p])]
            rows.append(dict(prompt=prompt, chosen=chosen, rejected=rejected))
    return rows, prepared.num_prompts


def trl_worker(root: Path, case: str, objective: str, requests: Requests) -> None:
    """TRL's trainer; a callback stops it between turns."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    rows, groups = sequences(settings(root, case, objective))
    size = round(PROMPTS[case] * len(rows) / groups)  # as many groups a step as ours
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)

    class Turns(TrainerCallback):
        left = 0

        def on_step_begin(self, args, state, control, **_):
            if self.left == 0:
                wanted = requests.next()
                if wanted is None:
                    sys.exit(0)
                self.left = wanted

        def on_step_end(self, args, state, control, **_):
            self.left -= 1
            if self.left == 0:
                requests.done()

    common = dict(
        output_dir=str(root / "trl"),
        per_device_train_batch_size=size,
        max_steps=10**6,
        learning_rate=1e-6,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    if objective.startswith("sft"):
        rows = Dataset.from_list(rows)
        arguments = trl.SFTConfig(max_length=None, padding_free=objective == "sft_padding_free", **common)
        trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    else:
        decoded = [{k: tokenizer.decode(v, skip_special_tokens=False) for k, v in row.items()} for row in rows]
        arguments = trl.DPOConfig(beta=0.1, max_length=None, precompute_ref_log_probs=objective == "dpo", **common)
        data = Dataset.from_list(decoded)
        trainer = trl.DPOTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        found = next(iter(trainer.train_dataset))
        if (found["prompt_ids"], found["chosen_ids"]) != (rows[0]["prompt"], rows[0]["chosen"]):
            raise SystemExit(f"TRL tokenised another sequence than ours: {found} against {rows[0]}")
    trainer.add_callback(Turns())
    requests.ready(groups_per_step=size * groups / len(rows), items_per_step=size)
    trainer.train()


def worker(side: str, root: Path, case: str, objective: str) -> None:
    """One of the two processes."""
    requests = Requests()
    if side == "trl":
        return trl_worker(root, case, objective, requests)
    trainer = Trainer(settings(root, case, objective))
    plan = trainer.feed.sampler.step(0)
    facts = dict(groups_per_step=plan.num_prompts, sharing=trainer.feed.sampler.sharing_reason)
    requests.serve(trainer.step, padding_share=plan.padding_share, **facts)


def measure(case: str, turns: int, steps: int, threads: int) -> list[dict]:
    """All rows of one case."""
    found = []
    with tempfile.TemporaryDirectory(prefix="fuserl-trl-") as folder:
        root = Path(folder)
        prepare_case(root, case)
        for ours, theirs in (("dpo", ("dpo", "dpo_live")), ("sft", ("sft", "sft_padding_free"))):
            sides = {"ours": ("ours", ours)} | {name: ("trl", name) for name in theirs}
            commands = {
                name: [__file__, "--worker", side, folder, case, objective] for name, (side, objective) in sides.items()
            }
            times, facts = take_turns(commands, turns, steps, threads)
            groups = {name: fact["groups_per_step"] for name, fact in facts.items()}
            ratios = {name: ratio(times[name], times["ours"], groups["ours"] / groups[name]) for name in theirs}
            best = min(theirs, key=lambda n: ratios[n]["median"]) if ours == "sft" else "dpo"
            row = dict(case=case, objective=ours, ratio=ratios[best], against=best, all_ratios=ratios)
            row |= dict(goal=GOALS.get((case, ours)), facts=facts, seconds_per_step=times)
            row["groups_per_second"] = {name: groups[name] / min(times[name]["wall"]) for name in times}
            found.append(row)
            goal = f" (goal {row['goal']})" if row["goal"] else ""
            others = ", ".join(f"{n} {r['median']:.2f}x (processor time {r['cpu']:.2f}x)" for n, r in ratios.items())
            print(
                f"{case:5s} {ours:4s} {row['ratio']['median']:.2f}x TRL's groups/s{goal}; against {others}", flush=True
            )
    return found


def plot(rows: list[dict], path: str) -> None:
    """Bars of the ratios."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(f"{r['case']}\n{n}", v["median"]) for r in rows for n, v in r["all_ratios"].items()]
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.bar(*zip(*bars, strict=True), color="tab:blue")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("groups/s, ours / TRL")
    axes.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="of each side in one turn")
    parser.add_argument("--quick", action="store_true", help="3 turns of 2 steps")
    add_common_options(parser)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, folder, case, objective = options.worker
        return worker(side, Path(folder), case, objective)
    turns, steps = (3, 2) if options.quick else (options.turns, options.steps)
    rows = [row for case in options.cases for row in measure(case, turns, steps, options.threads)]
    write_up(options, rows, plot)


if __name__ == "__main__":
    main()
