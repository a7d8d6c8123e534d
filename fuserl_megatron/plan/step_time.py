"""How long a step takes: a sum of parts, each with its hardware limit.

    products    bf16 or FP8 matrix products of the layers at a share of the dense peak            fitted: Fit.gemm
    attention   causal attention, and the vocabulary product, in bf16 at a share of its peak      assumed: ATTENTION
    traffic     norms, activations, rotary, casts to FP8: bytes over the memory's bandwidth       assumed: MEMORY
    tensor      all-gathers and reduce-scatters of TP over NVLink; some of it hides               fitted: Fit.exposed
    context     all-gather of keys and values of CP, the same share of it
    bubble      (P - 1) / (V m) of the above: P stages, V virtual stages, m micro-batches
    data        reduction of gradients and gathering of weights over DP, the same share of it; the optimizer's traffic

The two parameters are fitted by `benchmarks/cost_model.py` to published rows of H100 (docs/performance.md has the
errors). Left out: contention in the network, stragglers, latencies of small messages, the host. So what it says of
many GPUs is an upper bound.
"""

import math
from dataclasses import dataclass

from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.plan.cards import CARDS, Card

MEMORY = 0.8
"""Share of the memory's bandwidth that a copy reaches."""
ATTENTION, VOCABULARY = 0.5, 0.75
"""Shares of the bf16 peak."""


@dataclass(frozen=True)
class Matrices:
    """A decoder's sizes, in elements."""

    layers: int
    hidden: int
    channels: int
    heads: int
    groups: int
    vocabulary: int = 128256
    head_dim: int | None = None
    """None: hidden / heads."""
    tied: bool = False

    @classmethod
    def of(cls, shape: ModelShape) -> "Matrices":
        """Of a model that is read from a directory."""
        return cls(
            shape.num_layers,
            shape.hidden_size,
            shape.ffn_hidden_size,
            shape.num_attention_heads,
            shape.num_query_groups,
            shape.vocab_size,
            shape.head_dim,
            shape.tie_word_embeddings,
        )

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of the queries, of keys and values together, of gate and up together."""
        dim = self.head_dim or self.hidden // self.heads
        return self.heads * dim, 2 * self.groups * dim, 2 * self.channels

    @property
    def layer_parameters(self) -> int:
        """Of the four matrices of a layer."""
        query, key_value, gate_up = self.widths
        return self.hidden * (2 * query + key_value + gate_up + self.channels)

    @property
    def embedding_parameters(self) -> int:
        """Of the vocabulary's matrices, input and output."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of all matrices."""
        return self.layers * self.layer_parameters + self.embedding_parameters


@dataclass(frozen=True)
class Layout:
    """How a model and its rows lie over GPUs."""

    gpus: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int = 1
    recompute: str = "none"
    """none or full: a further forward pass of the layers."""

    @property
    def dp(self) -> int:
        """What is left."""
        return self.gpus // (self.tp * self.pp * self.cp)


@dataclass(frozen=True)
class Work:
    """What a step computes: rows of `length` positions."""

    rows: int
    length: int
    format: str = "bf16"
    """bf16 or fp8."""
    frozen: bool = False
    """The matrices are not trained (LoRA): they need no gradients."""
    fsdp: bool = False
    """Weights are gathered for every micro-batch (of the published rows; not offered here)."""


@dataclass(frozen=True)
class Fit:
    """The two fitted parameters."""

    gemm: float
    """Share of the dense peak that the layers' matrix products reach."""
    exposed: float
    """Share of the communication that computation does not hide."""


FITTED = Fit(0.48, 0.30)
"""To the published rows; a test fits them again."""


def bandwidth(card: Card, ranks: int, stride: int) -> float:
    """Of a group of `ranks` GPUs that are `stride` apart: NVLink while it stays inside a node."""
    return card.nvlink if ranks * stride <= card.per_node else card.network


def step_seconds(
    model: Matrices, layout: Layout, work: Work, card: Card = CARDS["H100"], fit: Fit = FITTED
) -> dict[str, float]:
    """Seconds of one step by part (see the head of this file)."""
    tokens, dp = work.length / layout.cp, layout.dp  # tokens of one micro-batch of one row on one GPU
    micro_batches, layers = math.ceil(work.rows / dp), model.layers / layout.pp
    query, key_value, gate_up = model.widths
    again = 1 if layout.recompute == "full" else 0
    passes = (2 if work.frozen else 3) + again  # frozen matrices need no gradient of their own
    share = tokens / layout.tp  # of a micro-batch's tokens or of a matrix: the same product either way

    products = passes * 2 * model.layer_parameters * layers * share / (fit.gemm * card.peak(work.format))
    keys = (3 + again) * 4 * query * (work.length / 2) * layers * share / (ATTENTION * card.peak("bf16"))
    heads = passes - again
    vocabulary = heads * 2 * model.hidden * model.vocabulary * share / (VOCABULARY * card.peak("bf16")) / layout.pp
    # forward and backward: two norms and residuals (24 H), activation (8 F), rotary and layout of q, k, v (6 each)
    touched = 2 * (24 * model.hidden + 4 * gate_up + 6 * (query + key_value))
    if work.format == "fp8":  # every input and every output gradient is read and written twice, also transposed
        touched += 4 * (4 * model.hidden + 2 * query + key_value + gate_up + model.channels)
    traffic = touched * (1 + again / 3) * layers * share / (MEMORY * card.memory_bandwidth)
    # with sequence parallelism two gathers and two scatters forward, and again (and two more gathers) backward
    times = 8 + 4 * again + (0 if work.frozen else 2)
    moved = times * (layout.tp - 1) / layout.tp * 2 * model.hidden * tokens * layers
    tensor = fit.exposed * moved / bandwidth(card, layout.tp, 1)
    moved = (3 + again) * (layout.cp - 1) / layout.cp * 2 * key_value / layout.tp * work.length * layers
    context = fit.exposed * moved / bandwidth(card, layout.cp, layout.tp)

    parts = dict(products=products, attention=keys + vocabulary, traffic=traffic, tensor=tensor, context=context)
    parts = {name: micro_batches * seconds for name, seconds in parts.items()}
    parts["bubble"] = sum(parts.values()) * (layout.pp - 1) / (layout.vpp * micro_batches)
    own = 0 if work.frozen else model.parameters / (layout.tp * layout.pp)
    # gradients reduced in fp32 and weights gathered in bf16 once a step; with FSDP weights come twice a micro-batch
    ranks = dp * layout.cp
    per_step = own * (4 + 2 + (4 * micro_batches if work.fsdp else 0)) * (ranks - 1) / ranks
    reduced = fit.exposed * per_step / bandwidth(card, ranks, layout.tp)
    parts["data"] = reduced + own / ranks * 28 / (MEMORY * card.memory_bandwidth)
    return parts


def tokens_per_second(model: Matrices, layout: Layout, work: Work, card: Card, fit: Fit = FITTED) -> float:
    """Positions a second of one GPU."""
    return work.rows * work.length / sum(step_seconds(model, layout, work, card, fit).values()) / layout.gpus


def mfu(model: Matrices, layout: Layout, work: Work, card: Card, fit: Fit = FITTED) -> float:
    """Model FLOPs (attention over the keys seen; nothing that is computed again, no gradient of frozen matrices) over
    the dense peak of the format."""
    per_parameter = 4 if work.frozen else 6
    per_token = per_parameter * (model.layers * model.layer_parameters + model.hidden * model.vocabulary)
    per_token += 6 * model.layers * model.widths[0] * work.length
    return tokens_per_second(model, layout, work, card, fit) * per_token / card.peak(work.format)
