"""Llama-3.1-8B and 3B shapes with random weights on one GPU: FuseSFT and FusePO-DPO, bf16 and FP8, and TRL's DPO.

    python benchmarks/gpu.py --part 1 --out gpu_figures        each part takes less than 10 minutes
    python benchmarks/gpu.py --part 2 --out gpu_figures
    python benchmarks/gpu.py --smoke                           a tiny shape on the CPU: does the code run?

Nobody has run it on a GPU yet. Every case is a process of its own with a time limit; OUT/gpu.json is written anew
after each, with what went wrong where something did. A case that runs out of memory is tried once more with whole
layers recomputed. All parameters are trained. 8B does not fit one H200 with fp32 moments (18 bytes a parameter): Adam's
moments are bf16 there (14 bytes a parameter). TRL's
side has bf16 weights, gradients and moments (8 bytes a parameter) and recomputes activations, its default.

Groups are full rows of 4096 positions: FusePO 4 sources x 2 responses of 480 tokens under a prompt of 256 (4 pairs),
FuseSFT 4 responses of 960. TFLOP/s are model FLOPs (metrics/flops.py) of real tokens. Reference log-probabilities are
given (0), for TRL computed before the clock starts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _cases import SKILLS, NoReference, Trainer, build_data, machine, write_records  # noqa: F401

SHAPES = {
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "3B": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4),
}
PARTS = {
    "1": ["3B-sft-bf16", "3B-dpo-bf16", "8B-sft-bf16", "8B-dpo-bf16", "8B-trl-bf16"],
    "2": [
        "8B-sft-fp8_current",
        "8B-dpo-fp8_current",
        "8B-sft-fp8_delayed",
        "8B-sft-fp8_blockwise",
        "3B-sft-fp8_current",
        "3B-trl-bf16",
    ],
    "smoke": ["tiny-sft-32", "tiny-dpo-32", "tiny-trl-32"],
}
PART_SECONDS, CASE_SECONDS = 570, 170
PROMPTS, WARM_UP, STEPS = 8, 2, 4


def prepare(root: Path, case: str) -> list[str]:
    """config.json, tokenizer and groups of a case; returns the run's settings."""
    size, what, precision = case.split("-")
    tiny, model = size == "tiny", root / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_bytes((SKILLS / "target" / name).read_bytes())
    fields = json.loads((SKILLS / "target" / "config.json").read_text()) | SHAPES[size]
    fields |= dict(num_key_value_heads=2 if tiny else 8, head_dim=16 if tiny else 128)
    fields |= dict(
        vocab_size=128256 if not tiny else 512, max_position_embeddings=8192, tie_word_embeddings=size == "3B"
    )
    (model / "config.json").write_text(json.dumps(fields))
    scale = 8 if tiny else 1
    response = (960 if what == "sft" else 480) // scale
    responses = 1 if what == "sft" else 2
    write_records(root / "r.jsonl", 8 * PROMPTS, 4, 256 // scale, response, responses=responses, jitter=0.0)
    build_data([root / "r.jsonl"], model, root / "data", 8192)
    settings = dict(
        [
            ("run.results_dir", root / "run"),
            ("run.disable_checks", "[first_step_loss]"),
            ("model.path", model),
            ("data.path", root / "data"),
            ("data.seq_length", 4096 // scale),
            ("data.global_batch_size", PROMPTS),
            ("data.packing.share_prefix", "on"),
            ("trainer.accelerator", "cpu" if tiny else "gpu"),
            ("trainer.precision", f"'{precision}'"),
            ("exp_manager.create_tensorboard_logger", "false"),
            ("objective", "fusesft" if what == "sft" else "fusepo_dpo"),
            ("optim.lr", 1e-6),
        ]
    )
    if size == "8B":
        settings |= {
            "optim.use_distributed_optimizer": "true",
            "optim.use_precision_aware_optimizer": "true",
            "optim.exp_avg_dtype": "bf16",
            "optim.exp_avg_sq_dtype": "bf16",
        }
    return [f"{key}={value}" for key, value in settings.items()]


def peak_gb() -> float | None:
    """Peak of the GPU's memory; None on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def ours(settings: list[str]) -> dict:
    """The trainer's whole steps: medians of what its meters say."""
    from fuserl_megatron.config.load import load_config

    trainer, records = Trainer(load_config("train", settings), random_weights=True), []
    trainer.log.step = records.append
    for _ in range(WARM_UP + STEPS):
        trainer.step()
    shown = [n for n in records[-1] if n.startswith("seconds") or n.endswith("_per_second")]
    shown += ["model_tflops_per_device", "padding_share", *(["mfu"] if "mfu" in records[-1] else [])]
    found = {name: statistics.median(r[name] for r in records[WARM_UP:]) for name in shown}
    return found | dict(memory_gb=peak_gb(), loss=records[-1]["loss"])


def trl(settings: list[str], recompute: bool) -> dict:
    """TRL's DPOTrainer on the same pairs."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from vs_trl import sequences

    from fuserl_megatron.config.load import load_config

    config = load_config("train", settings)
    on_gpu = torch.cuda.is_available()
    rows, groups = sequences(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    tokens = PROMPTS / groups * sum(2 * len(r["prompt"]) + len(r["chosen"]) + len(r["rejected"]) - 2 for r in rows)
    rows = [{k: tokenizer.decode(v, skip_special_tokens=False) for k, v in row.items()} for row in rows]
    with torch.device("cuda" if on_gpu else "cpu"):
        dtype = torch.bfloat16 if on_gpu else torch.float32
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model.path), dtype=dtype)
    seconds = []

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, args, state, control, **_):
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    arguments = trl.DPOConfig(
        output_dir=config.run.results_dir,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=PROMPTS,  # 4 pairs a group: a group a micro-batch, as many groups a step as ours
        max_steps=WARM_UP + STEPS,
        beta=0.1,
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=recompute,
        learning_rate=1e-6,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        bf16=on_gpu,
        use_cpu=not on_gpu,
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.add_callback(Clock())
    trainer.train()
    taken = statistics.median(seconds[WARM_UP:])
    found = dict(seconds=taken, groups_per_second=PROMPTS / taken, tokens_per_second=tokens / taken)
    return found | dict(memory_gb=peak_gb(), recompute=recompute)


def run_case(case: str, recompute: str) -> None:
    """What a case's process does: prints one JSON line."""
    with tempfile.TemporaryDirectory(prefix="fuserl-gpu-") as folder:
        settings = prepare(Path(folder), case)
        if case.split("-")[1] == "trl":
            found = trl(settings, recompute != "none")
        else:
            found = ours([*settings, f"model.recompute_granularity={recompute}"]) | dict(recompute=recompute)
    print("RESULT " + json.dumps(found), flush=True)


def attempt(case: str, recompute: str, limit: float) -> dict:
    """One case in a process of its own."""
    started = time.monotonic()
    command = [sys.executable, __file__, "--case", case, "--recompute", recompute]
    try:
        done = subprocess.run(command, timeout=limit, capture_output=True, text=True)
        lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        error = (done.stderr or done.stdout).strip().splitlines()[-12:]
        found = json.loads(lines[-1]) if lines else dict(error=error, exit_code=done.returncode)
    except subprocess.TimeoutExpired:
        found = dict(error=f"not done after {limit:.0f} s")
    return found | dict(wall_seconds=time.monotonic() - started)


def device_name() -> str | None:
    """Of the GPU, without keeping it busy from this process."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["1", "2"], default=None)
    parser.add_argument("--smoke", "--quick", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--out", default=None, help="directory of gpu.json (default: none is written)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--recompute", default="none", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        return run_case(options.case, options.recompute)
    if not options.smoke and (options.part is None or device_name() is None):
        parser.error("needs --part 1 or --part 2 and a GPU, or --smoke")
    report = machine() | dict(device=device_name(), cases={})
    file = Path(options.out) / "gpu.json" if options.out else None
    if file and file.exists():
        report["cases"] = json.loads(file.read_text())["cases"]
    started, failed = time.monotonic(), False
    for case in PARTS["smoke" if options.smoke else options.part]:
        left = PART_SECONDS - (time.monotonic() - started)
        recompute = "full" if "trl" in case and not options.smoke else "none"
        found = attempt(case, recompute, min(CASE_SECONDS, left)) if left > 30 else dict(error="no time left")
        left = PART_SECONDS - (time.monotonic() - started)
        if "OutOfMemory" in str(found.get("error")) and recompute == "none" and left > 60:
            found = attempt(case, "full", min(CASE_SECONDS, left)) | dict(first_try="out of memory")
        report["cases"][case] = found
        failed |= "error" in found
        print(case, json.dumps(found), flush=True)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(report, indent=2) + "\n")
    cases = report["cases"]
    for size in ("8B", "3B", "tiny"):
        for ours_name in (name for name in cases if name.startswith(f"{size}-dpo")):
            theirs = next((cases[n] for n in cases if n.startswith(f"{size}-trl")), {})
            if "seconds" in theirs and "seconds" in cases[ours_name]:
                print(f"{ours_name}: {theirs['seconds'] / cases[ours_name]['seconds']:.2f}x TRL's groups/s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
