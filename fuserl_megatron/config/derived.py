"""What follows from the settings: layout product, batch arithmetic, number of steps. Numbers, and lines to print."""

import math
from dataclasses import replace

from fuserl_megatron.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TrainerConfig


def replica_ranks(model: ModelConfig) -> int:
    """TP x PP x CP: the ranks that hold the model once."""
    return model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size


def steps_per_epoch(config: Config, num_prompts: int) -> int:
    """The last batch of an epoch is filled up with groups of weight 0."""
    return math.ceil(num_prompts / config.data.global_batch_size)


def total_steps(trainer: TrainerConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the run: the smaller of max_epochs and max_steps."""
    limits = [trainer.max_steps] if trainer.max_steps is not None else []
    if trainer.max_epochs is not None:
        limits.append(trainer.max_epochs * steps_per_epoch)
    return min(limits)


def warmup_steps(optim: OptimConfig, total: int) -> int:
    """Steps of linear warm-up: warmup_steps where it is set, otherwise warmup_ratio of all steps, rounded up."""
    sched = optim.sched
    return sched.warmup_steps if sched.warmup_steps is not None else math.ceil(sched.warmup_ratio * total)


FP8_MULTIPLES = {"fp8_delayed": 16, "fp8_current": 16, "fp8_blockwise": 128, "fp8_mxfp8": 32}
"""What Transformer Engine asks of both sizes of a matrix, by trainer.precision."""


def row_multiple(config: Config) -> int:
    """What the layout asks of data.seq_length: two chunks for every context rank, whose part the tensor ranks share."""
    model = config.model
    cp, tp = model.context_parallel_size, model.tensor_model_parallel_size if model.sequence_parallel else 1
    return cp * math.lcm(2 if cp > 1 else 1, tp)


def row_length(config: Config) -> int:
    """Positions of a row: data.seq_length, with FP8 rounded up to what a rank's matrix products need."""
    model, data = config.model, config.data
    if config.trainer.precision not in FP8_MULTIPLES:
        return data.seq_length
    ranks = model.context_parallel_size * (model.tensor_model_parallel_size if model.sequence_parallel else 1)
    positions = FP8_MULTIPLES[config.trainer.precision] * ranks
    multiple = math.lcm(positions // math.gcd(positions, data.micro_batch_size), row_multiple(config))
    return -(-data.seq_length // multiple) * multiple


def row_settings(config: Config) -> DataConfig:
    """The settings by which rows are laid out: those of the run with `row_length`."""
    return replace(config.data, seq_length=row_length(config))


def layout_fact(config: Config, world_size: int, data_parallel_size: int) -> str:
    """The layout as a product equal to the world size."""
    model = config.model
    tp, pp, cp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
    extra = ", sequence parallel" if model.sequence_parallel else ""
    return f"layout   TP {tp} x PP {pp} x CP {cp} x DP {data_parallel_size} = {world_size} ranks{extra}"


def batch_fact(config: Config, data_parallel_size: int) -> str:
    """Prompts of a step over the ranks, tokens of a micro-batch."""
    data = config.data
    share = data.global_batch_size / data_parallel_size
    per_rank = f"{share:g}" if share == int(share) else f"up to {math.ceil(share)}"
    length = row_length(config)
    tokens = data.micro_batch_size * length
    return (
        f"batch    {data.global_batch_size} prompts a step = {per_rank} on each of {data_parallel_size} data-parallel "
        f"ranks; micro-batch {data.micro_batch_size} x {length} = {tokens} tokens"
    )


def steps_fact(config: Config, steps: int, warmup: int, num_prompts: int | None) -> str:
    """Steps of the run and where the number comes from."""
    source = f"trainer.max_steps={config.trainer.max_steps}"
    if num_prompts is not None and config.trainer.max_epochs is not None:
        per_epoch = steps_per_epoch(config, num_prompts)
        if steps == per_epoch * config.trainer.max_epochs:
            batch, passes = config.data.global_batch_size, config.trainer.max_epochs
            source = f"{num_prompts} prompts / {batch} = {per_epoch} a pass x {passes}"
    # FusePO drops prompts without a pair, which shows when the data set is read
    limit = "at most " if config.objective.stage == "fusepo" and "prompts" in source else ""
    return f"steps    {limit}{steps} ({source}), {warmup} of them warm-up"
