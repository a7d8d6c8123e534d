"""Bytes that the fullest GPU needs, by part. Nobody has compared them with a GPU yet (docs/performance.md).

weights       bf16, 2 a parameter of the stage; embeddings lie on the first stage, the output matrix on the last
gradients     fp32, 4 a parameter (core's buffer)
states        fp32 master weights and two moments, 12 a parameter, over DP x CP with the distributed optimizer
              (with LoRA gradients and states are those of the adapter, whose bf16 weights come on top)
activations   none recomputed: 2 (6.5 H + 3 F) a token and layer, over TP with sequence parallelism; full: the layers'
              inputs, 2 H, and one layer's activations. The first stage holds those of PP micro-batches
              (with V virtual stages 1 + (PP - 1) / (PP V) times as many)
logits        a chunk of scored positions over V / TP, in fp32: logits, their gradient, their softmax
reference     reference_mode=resident: its weights beside
other         CUDA's context, NCCL's buffers, and what the allocator cannot use
"""

from dataclasses import dataclass

from fuserl_megatron.plan.step_time import Layout, Matrices

CONTEXT = 3.5e9
FRAGMENTS = 0.05
"""Of everything else."""


@dataclass(frozen=True)
class Keeping:
    """What a run keeps in memory besides the layout."""

    length: int
    """Positions of a row."""
    micro_batch: int = 1
    """Rows of a micro-batch."""
    distributed_optimizer: bool = True
    logprob_chunk: int = 1024
    resident_reference: bool = False
    adapter: tuple[int, int] | None = None
    """LoRA: numbers of a layer's adapter that TP cuts, and that every tensor rank holds; None: all is trained."""


def memory_bytes(model: Matrices, layout: Layout, keeping: Keeping) -> dict[str, float]:
    """Bytes on the fullest GPU by part."""
    tp, pp = layout.tp, layout.pp
    layers = model.layers * model.layer_parameters / (tp * pp)
    ends = model.vocabulary * model.hidden / tp
    # one stage has both matrices, or the first and the last one each; tied ones are there twice
    own = layers + (ends * (1 if model.tied else 2) if pp == 1 else ends)
    shards = layout.dp * layout.cp if keeping.distributed_optimizer else 1
    positions = keeping.micro_batch * keeping.length / layout.cp
    _, _, gate_up = model.widths
    a_layer = 2 * (6.5 * model.hidden + 1.5 * gate_up) * positions / tp
    per_stage = model.layers / pp
    in_flight = pp * (1 + (pp - 1) / (pp * layout.vpp)) if layout.vpp > 1 else pp
    kept = 2 * model.hidden * positions / tp if layout.recompute == "full" else a_layer
    activations = per_stage * kept * in_flight + (a_layer if layout.recompute == "full" else 0)
    cut, whole = keeping.adapter or (0, 0)
    adapter = per_stage * (cut / tp + whole)
    trained = own if keeping.adapter is None else adapter
    parts = {
        "weights": 2 * (own + adapter),
        "gradients": 4 * trained,
        "states": 12 * trained / shards,
        "activations": activations,
        "logits": 3 * 4 * keeping.logprob_chunk * model.vocabulary / tp,
        "reference": 2 * own if keeping.resident_reference else 0.0,
    }
    return parts | {"other": CONTEXT + FRAGMENTS * sum(parts.values())}
