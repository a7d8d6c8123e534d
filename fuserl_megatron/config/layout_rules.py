"""Rules between the layout over the ranks, the model's shape and the data set."""

import math
from typing import Protocol

from fuserl_megatron.config.derived import FP8_MULTIPLES, replica_ranks, row_multiple
from fuserl_megatron.config.rules import refuse
from fuserl_megatron.config.schema import Config
from fuserl_megatron.util.errors import UserError


class ModelShape(Protocol):
    """What the checks ask of a model (`convert.hf_config.read_config` gives it). Counts, not bytes."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def head_dim(self) -> int:
        """Of one attention head."""

    @property
    def ffn_hidden_size(self) -> int:
        """MLP channels."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""

    @property
    def num_query_groups(self) -> int:
        """Key/value heads."""

    @property
    def vocab_size(self) -> int:
        """Without padding."""

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence in tokens."""


class DataSet(Protocol):
    """What the checks ask of a fused data set (its manifest)."""

    @property
    def num_prompts(self) -> int:
        """Groups."""

    @property
    def max_token_id(self) -> int:
        """The model's vocabulary must be larger."""

    @property
    def tokens(self) -> dict[str, float]:
        """Has total_max: tokens of the longest prompt + response."""


def check_layout(config: Config, world_size: int) -> int:
    """What the parallel sizes ask of each other and of the ranks; returns the data-parallel size."""
    model, length = config.model, config.data.seq_length
    tp, pp, cp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
    if model.virtual_pipeline_model_parallel_size is not None and pp == 1:
        rule = "virtual stages interleave pipeline stages, and model.pipeline_model_parallel_size is 1"
        refuse(config, "model.virtual_pipeline_model_parallel_size", rule, None)
    unit = replica_ranks(model)
    if world_size % unit:
        below = world_size // unit * unit
        choice = f"{below} or {below + unit}" if below else str(unit)
        raise UserError(
            f"world size {world_size}: must be a multiple of TP {tp} x PP {pp} x CP {cp} = {unit}; "
            f"--nproc {choice} would work."
        )
    if model.sequence_parallel and tp == 1:
        refuse(config, "model.sequence_parallel", "needs model.tensor_model_parallel_size > 1", False)
    multiple = row_multiple(config)
    if length % multiple:
        splits = [f"model.context_parallel_size={cp} cuts a row into {2 * cp} chunks"] if cp > 1 else []
        splits += [f"model.sequence_parallel splits it over {tp} ranks"] if model.sequence_parallel else []
        rule = f"{' and '.join(splits)}, so that it must be a multiple of {multiple}"
        refuse(config, "data.seq_length", rule, -(-length // multiple) * multiple)
    return world_size // unit


def check_tensor_parallel(shape: ModelShape, tp: int) -> None:
    """Refuse a size that would cut through a head, a group (key/value heads are not replicated) or the MLP unevenly."""
    counts = {
        "attention heads": shape.num_attention_heads,
        "key/value heads": shape.num_query_groups,
        "MLP channels": shape.ffn_hidden_size,
    }
    for what, count in counts.items():
        if count % tp:
            field, works = "model.tensor_model_parallel_size", _largest_divisor(math.gcd(*counts.values()), tp)
            raise UserError(f"{field}={tp}: does not divide the model's {count} {what}; {field}={works} would work.")


def check_model(config: Config, shape: ModelShape, data_set: DataSet | None) -> None:
    """What the layout asks of the model, and the data of both."""
    tp, pp = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    check_tensor_parallel(shape, tp)
    multiple = FP8_MULTIPLES.get(config.trainer.precision)
    if multiple is not None:
        heads = shape.num_attention_heads
        sizes = {
            "hidden size": shape.hidden_size,
            "MLP channels of a tensor rank": shape.ffn_hidden_size // tp,
            "query width of a tensor rank": heads * shape.head_dim // tp,
            "query, key and value width of a tensor rank": (heads + 2 * shape.num_query_groups) * shape.head_dim // tp,
        }
        for what, size in sizes.items():
            if size % multiple:
                rule = f"its matrix products need multiples of {multiple}, and the model's {what} is {size}"
                refuse(config, "trainer.precision", rule, "bf16")
    if shape.num_layers % pp:
        rule = f"does not divide the model's {shape.num_layers} layers"
        refuse(config, "model.pipeline_model_parallel_size", rule, _largest_divisor(shape.num_layers, pp))
    stages = config.model.virtual_pipeline_model_parallel_size
    if stages is not None and shape.num_layers // pp % stages:
        rule = f"does not divide the {shape.num_layers // pp} layers of a pipeline stage"
        works = _largest_divisor(shape.num_layers // pp, stages)
        refuse(config, "model.virtual_pipeline_model_parallel_size", rule, works if works > 1 else None)
    if data_set is not None:
        check_data_set(f"data.path={config.data.path}", shape, data_set)


def check_data_set(name: str, shape: ModelShape, data_set: DataSet) -> None:
    """What a model asks of a data set, which `name` names by its setting.

    A packed row may be longer than the limit: what counts is the longest prompt + response.
    """
    longest, limit = int(data_set.tokens["total_max"]), shape.max_position_embeddings
    if longest > limit:
        raise UserError(
            f"{name}: its longest prompt + response has {longest} tokens, and the model's max_position_embeddings is "
            f"{limit}; build it with max_length={limit}."
        )
    if data_set.max_token_id >= shape.vocab_size:
        raise UserError(
            f"{name}: holds token {data_set.max_token_id}, and the model's vocabulary has "
            f"{shape.vocab_size}; build the data set with the tokenizer of model.path."
        )


def _largest_divisor(number: int, at_most: int) -> int:
    return max(divisor for divisor in range(1, at_most + 1) if number % divisor == 0)
