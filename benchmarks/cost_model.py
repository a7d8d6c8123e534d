"""A small cost model of a training step: compared with published H100 rows, then asked about 8 to 1,024 GPUs.

    python benchmarks/cost_model.py --json cost_model.json --plot cost_model.svg

The model is `fuserl_megatron/plan/step_time.py`.

What is compared is tokens per second and GPU, the measured quantity (TFLOP/s depends on who counts). Two parameters are
fitted to the six rows that name a layout; the leave-one-out error refits them without the row. The seventh row is a
range over models without layouts: the model is asked for Llama-3 70B and 405B in bf16 and compared with the range.

What it leaves out: contention in the network, stragglers, latencies of small messages, the host. Predictions for many
GPUs are therefore upper bounds.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from fuserl_megatron.plan import step_time
from fuserl_megatron.plan.cards import CARDS
from fuserl_megatron.plan.step_time import Fit, Layout, Matrices, Work

H100 = CARDS["H100"]
MODELS = {
    "3B": Matrices(28, 3072, 8192, 24, 8),
    "8B": Matrices(32, 4096, 14336, 32, 8),
    "70B": Matrices(80, 8192, 28672, 64, 8),
    "405B": Matrices(126, 16384, 53248, 128, 8),
}


@dataclass(frozen=True)
class Job:
    """One run: model, layout, batch (rows of `length` tokens)."""

    name: str
    model: str
    gpus: int
    rows: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int = 1
    fsdp: bool = False
    length: int = 8192
    format: str = "fp8"
    lora: bool = False
    published: float | None = None
    """Tokens per second and GPU."""

    @property
    def parts(self) -> tuple[Matrices, Layout, Work]:
        """As the package's cost model takes it."""
        layout = Layout(self.gpus, self.tp, self.pp, self.cp, self.vpp)
        return MODELS[self.model], layout, Work(self.rows, self.length, self.format, self.lora, self.fsdp)


SOURCE = "Megatron-Bridge's performance archive, DGX-H100"
ROWS = [
    Job("8B pretrain", "8B", 8, 128, fsdp=True, published=14451),
    Job("8B pretrain, earlier", "8B", 8, 128, fsdp=True, published=14079),
    Job("70B pretrain", "70B", 64, 256, tp=4, pp=8, vpp=5, published=1664),
    Job("70B SFT", "70B", 32, 32, tp=4, pp=4, vpp=5, length=4096, published=1638),
    Job("70B LoRA", "70B", 8, 32, tp=2, pp=4, vpp=20, length=4096, lora=True, published=2643),
    Job("405B pretrain", "405B", 1024, 1536, tp=8, pp=8, cp=2, vpp=8, published=328),
]
BF16_RANGE = (0.41, 0.48)  # MFU of GPT 2B-462B on up to 6,144 H100 in bf16, Megatron-LM's README
BF16_JOBS = [
    Job("70B, bf16", "70B", 64, 256, tp=4, pp=8, vpp=5, format="bf16"),
    Job("405B, bf16", "405B", 1024, 1536, tp=8, pp=8, cp=2, vpp=8, format="bf16"),
]


def step_seconds(job: Job, fit: Fit) -> dict[str, float]:
    """Seconds of one step by part."""
    return step_time.step_seconds(*job.parts, H100, fit)


def tokens_per_second(job: Job, fit: Fit) -> float:
    """Of one GPU."""
    return step_time.tokens_per_second(*job.parts, H100, fit)


def mfu(job: Job, fit: Fit) -> float:
    """Model FLOPs over the dense peak of the number format."""
    return step_time.mfu(*job.parts, H100, fit)


def fit_to(rows: list[Job]) -> Fit:
    """The parameters with the smallest sum of squared relative errors, on a grid of 1 % and 2 %."""
    grid = [Fit(g / 200, e / 200) for g in range(60, 161, 2) for e in range(0, 201, 4)]

    def error(fit: Fit) -> float:
        return sum((tokens_per_second(row, fit) / row.published - 1) ** 2 for row in rows)

    return min(grid, key=error)


def layout_for(model: str, gpus: int) -> dict:
    """The shipped presets' layouts, data parallelism taking what is left."""
    return dict(fsdp=False) | (dict() if model == "8B" else dict(tp=4, pp=4, vpp=5))


def predictions(fit: Fit) -> list[dict]:
    """Tokens/s and GPU from 8 to 1,024 H100: the batch growing with the GPUs (weak) and staying as it is (strong)."""
    found = []
    for model, first, rows in (("8B", 8, 128), ("70B", 32, 128)):
        for number_format in ("bf16", "fp8"):
            for weak in (True, False):
                start = None
                for gpus in [g for g in (8, 16, 32, 64, 128, 256, 512, 1024) if g >= first]:
                    batch = rows * gpus // first if weak else 1024
                    job = Job(model, model, gpus, batch, format=number_format, **layout_for(model, gpus))
                    rate = tokens_per_second(job, fit)
                    start = start or rate
                    found.append(
                        dict(
                            model=model,
                            format=number_format,
                            gpus=gpus,
                            rows=batch,
                            scaling="weak" if weak else "strong",
                        )
                        | dict(tokens_per_second_per_gpu=rate, mfu=mfu(job, fit), efficiency=rate / start)
                    )
    return found


def plot(found: list[dict], errors: list[dict], path: str) -> None:
    """Published against predicted, and efficiency over GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    left.barh([e["row"] for e in errors], [100 * e["error"] for e in errors], color="tab:blue")
    left.set_xlabel("predicted / published - 1, %")
    for model in ("8B", "70B"):
        for scaling, style in (("weak", "-"), ("strong", "--")):
            rows = [r for r in found if (r["model"], r["scaling"], r["format"]) == (model, scaling, "fp8")]
            label = f"{model} FP8, {'batch grows' if scaling == 'weak' else '1,024 rows'}"
            right.semilogx([r["gpus"] for r in rows], [r["efficiency"] for r in rows], style, base=2, label=label)
    right.set_xlabel("H100")
    right.set_ylabel("tokens/s a GPU, relative")
    right.set_ylim(0, 1.05)
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="does nothing: it takes seconds anyway")
    parser.add_argument("--json", default=None, help="write the figures to this file")
    parser.add_argument("--plot", default=None, help="write a plot to this file")
    options = parser.parse_args()
    fit, errors = fit_to(ROWS), []
    print(
        f"fitted to {len(ROWS)} rows: products at {fit.gemm:.1%} of the peak, {fit.exposed:.0%} of communication seen"
    )
    print(f"{'row':24s} {'published':>9s} {'predicted':>9s} {'error':>7s} {'left out':>8s}   share of the step")
    for row in ROWS:
        rate = tokens_per_second(row, fit)
        alone = tokens_per_second(row, fit_to([r for r in ROWS if r is not row])) / row.published - 1
        parts = step_seconds(row, fit)
        shares = {name: seconds / sum(parts.values()) for name, seconds in parts.items()}
        errors.append(
            dict(row=row.name, published=row.published, predicted=rate, error=rate / row.published - 1)
            | dict(error_left_out=alone, shares=shares)
        )
        text = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share > 5e-4)
        print(f"{row.name:24s} {row.published:9,.0f} {rate:9,.0f} {errors[-1]['error']:+7.1%} {alone:+8.1%}   {text}")
    for job in BF16_JOBS:
        low, high = BF16_RANGE
        found = mfu(job, fit)
        off = max(low / found - 1, found / high - 1, 0.0)
        errors.append(
            dict(row=job.name, published=BF16_RANGE, predicted=found, error=off if found > high else 0.0 - off)
        )
        print(f"{job.name:24s} {low:.0%}-{high:.0%} MFU   {found:6.1%} {errors[-1]['error']:+7.1%}")
    sizes = [abs(e["error"]) for e in errors]
    of_rows = sizes[: len(ROWS)]
    left_out = [abs(e["error_left_out"]) for e in errors if "error_left_out" in e]
    print(f"mean error of the {len(ROWS)} rows {sum(of_rows) / len(of_rows):.1%}, worst {max(sizes):.1%}; ", end="")
    print(f"each row left out of its own fit: mean {sum(left_out) / len(left_out):.1%}, worst {max(left_out):.1%}")
    found = predictions(fit)
    for r in found:
        if r["gpus"] in (8, 32, 128, 1024):
            what = f"{r['model']:4s} {r['format']:4s} {r['gpus']:5d} GPUs {r['rows']:6d} rows ({r['scaling']})"
            speed = f"{r['tokens_per_second_per_gpu']:8,.0f} tokens/s a GPU  MFU {r['mfu']:.1%}"
            print(f"{what:44s} {speed}  {r['efficiency']:.0%} of the smallest")
    if options.json:
        report = dict(source=SOURCE, gemm=fit.gemm, exposed=fit.exposed, rows=errors, predictions=found)
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    if options.plot:
        plot(found, errors, options.plot)


if __name__ == "__main__":
    main()
