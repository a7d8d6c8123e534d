"""What a step of this trainer costs beyond the bare forward and backward pass of the same model on the same tokens.

    python benchmarks/overhead.py --json overhead.json --plot overhead.svg

    ours   the loop: planning and laying the batch, forward and backward through core's schedule and DDP, the loss
           and its metrics, gradient norm, clipping, AdamW, checks, log line, metrics.jsonl, TensorBoard
    bare   a Llama written out in plain torch on the very same rows, masks made before: forward, log-probabilities of
           the scored tokens, backward, gradient norm, AdamW; nothing else

Both on one thread in turns, fp32, FusePO-DPO with a stored reference. `bare` computes the vocabulary product once, we
twice (its logits are recomputed in the backward pass, to save memory): that is part of the overhead.

    demo   examples/skills: a model of 0.4 million weights, rows of 256
    tiny   3 million weights, rows of 1024
"""

import argparse
import tempfile
from pathlib import Path

from _cases import DPO, Trainer, add_common_options, prepare_case, run_config, write_up
from _turns import Requests, ratio, take_turns

GOAL = 0.15
LAYOUT = {"demo": dict(seq_length=256, rows=4, prompts=24), "tiny": dict(seq_length=1024, rows=1, prompts=8)}


class Bare:
    """The same weights in plain torch; one call is a step on the next of the batches it was given."""

    def __init__(self, config, steps: int):
        """Take the batches of the run's first steps, and weights from its Hugging Face directory."""
        import torch
        from safetensors.torch import load_file

        from fuserl_megatron.convert.hf_config import read_config
        from fuserl_megatron.data.dataset import FusedDataset
        from fuserl_megatron.data.pairs import prepare
        from fuserl_megatron.data.sampler import GlobalBatchSampler

        path = Path(config.model.path)
        prepared = prepare(FusedDataset(config.data.path), config.objective, None)
        sampler = GlobalBatchSampler(prepared, config.data, config.run.seed, 1)
        self.shape = read_config(path)
        self.weights = {n: w.float().requires_grad_() for n, w in load_file(path / "model.safetensors").items()}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=1e-6, weight_decay=0.01)
        dim = self.shape.head_dim
        inverse = 1.0 / self.shape.rope.theta ** (torch.arange(0, dim, 2) / dim)
        self.batches, self.done = [], 0
        for step in range(steps):
            parts = []
            for b in sampler.micro_batches(sampler.step(step), 0):
                angles = torch.cat([b.positions_BS[..., None] * inverse] * 2, -1)[:, None]
                keys = b.segment_ids_BS[:, None, :]
                seen = (b.segment_ids_BS[..., None] == keys) | (b.parent_ids_BS[..., None] == keys)
                mask = seen.tril()[:, None]
                parts.append((b.tokens_BS, b.labels_BS, angles.cos(), angles.sin(), mask))
            self.batches.append(parts)

    def logps(self, tokens_BS, labels_BS, cos, sin, mask):
        """Log-probabilities of the scored tokens."""
        import torch
        import torch.nn.functional as F

        shape, w = self.shape, self.weights
        heads, groups = shape.num_attention_heads, shape.num_query_groups
        rows, length = tokens_BS.shape

        def rotate(t):
            first, second = t.chunk(2, -1)
            return t * cos + torch.cat((-second, first), -1) * sin

        x = F.embedding(tokens_BS, w["model.embed_tokens.weight"])
        for i in range(shape.num_layers):
            at, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
            h = F.rms_norm(x, x.shape[-1:], w[f"model.layers.{i}.input_layernorm.weight"], shape.rms_norm_eps)
            q, k, v = (
                F.linear(h, w[f"{at}{n}_proj.weight"]).view(rows, length, count, -1).transpose(1, 2)
                for n, count in (("q", heads), ("k", groups), ("v", groups))
            )
            out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=mask, enable_gqa=True)
            x = x + F.linear(out.transpose(1, 2).flatten(2), w[f"{at}o_proj.weight"])
            h = F.rms_norm(x, x.shape[-1:], w[f"model.layers.{i}.post_attention_layernorm.weight"], shape.rms_norm_eps)
            gate, up = (F.linear(h, w[f"{mlp}{n}_proj.weight"]) for n in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, w[f"{mlp}down_proj.weight"])
        x = F.rms_norm(x, x.shape[-1:], w["model.norm.weight"], shape.rms_norm_eps)
        scored_BS = labels_BS >= 0
        output = w["model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"]
        return -F.cross_entropy(F.linear(x[scored_BS], output), labels_BS[scored_BS], reduction="none")

    def step(self) -> None:
        """Forward, backward, clipping and AdamW on one global batch."""
        import torch

        for parts in self.batches[self.done % len(self.batches)]:
            (-self.logps(*parts).sum() / 1000).backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1


def worker(side: str, root: Path, case: str) -> None:
    """One of the two processes."""
    requests = Requests()
    config = run_config(root, DPO, **LAYOUT[case])
    if side == "ours":
        return requests.serve(Trainer(config).step)
    from fuserl_megatron.config.objective import with_loss_defaults

    requests.serve(Bare(with_loss_defaults(config), 12).step)


def measure(case: str, turns: int, steps: int, threads: int) -> dict:
    """One row."""
    with tempfile.TemporaryDirectory(prefix="fuserl-overhead-") as folder:
        prepare_case(Path(folder), case)
        commands = {side: [__file__, "--worker", side, folder, case] for side in ("ours", "bare")}
        times, _ = take_turns(commands, turns, steps, threads)
    found = ratio(times["ours"], times["bare"])
    print(
        f"{case}: {found['median'] - 1:+.1%} (turns {found['min'] - 1:+.1%} to {found['max'] - 1:+.1%}; fastest turns "
        f"{found['of_minima'] - 1:+.1%}; processor time {found['cpu'] - 1:+.1%}); goal {GOAL:+.0%}",
        flush=True,
    )
    return dict(case=case, ratio=found, goal=1 + GOAL, seconds_per_step=times)


def plot(rows: list[dict], path: str) -> None:
    """Fastest turns of both sides."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4, 3))
    axes.bar([r["case"] for r in rows], [100 * (r["ratio"]["median"] - 1) for r in rows], color="tab:blue")
    axes.axhline(100 * GOAL, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylabel("over the bare step, %")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(LAYOUT), default=list(LAYOUT))
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--steps", type=int, default=6, help="of each side in one turn")
    parser.add_argument("--quick", action="store_true", help="3 turns of 3 steps")
    add_common_options(parser)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, folder, case = options.worker
        return worker(side, Path(folder), case)
    turns, steps = (3, 3) if options.quick else (options.turns, options.steps)
    rows = [measure(case, turns, steps, options.threads) for case in options.cases]
    write_up(options, rows, plot)


if __name__ == "__main__":
    main()
