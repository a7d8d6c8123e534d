"""What rank 0 says before the first step and after the last."""

import importlib.metadata
import platform
from pathlib import Path

import torch

import fuserl_megatron
from fuserl_megatron.config.objective import loss_options, uses_reference
from fuserl_megatron.config.schema import Config
from fuserl_megatron.convert import peft
from fuserl_megatron.convert.hf_config import ModelShape
from fuserl_megatron.convert.names import hf_shapes
from fuserl_megatron.data.pairs import PreparedSet
from fuserl_megatron.data.sampler import GlobalBatchSampler
from fuserl_megatron.mcore.parallel import Layout
from fuserl_megatron.metrics.flops import describe_peak, step_flops
from fuserl_megatron.metrics.report import FILE, write_report
from fuserl_megatron.metrics.run_log import duration, say
from fuserl_megatron.runtime.stopping import resume_command
from fuserl_megatron.util.errors import UserError


def num_parameters(shape: ModelShape) -> int:
    """Parameters of the whole model; tied weights count once."""
    return sum(torch.Size(dims).numel() for dims in hf_shapes(shape).values())


def versions() -> str:
    """Of this package and of what its numbers depend on."""
    core = importlib.metadata.version("megatron-core")
    others = f"torch {torch.__version__}, megatron-core {core}, Python {platform.python_version()}"
    return f"fuserl-megatron {fuserl_megatron.__version__} | {others}"


def describe_end(
    config: Config, done: int, step: int, total: int, saved: int, exported: Path | None, seconds: float
) -> None:
    """What there is now and where, and the command that was typed: again, it goes on from the last checkpoint."""
    directory = config.run.results_dir
    took = f"{step - done} of them now, " if done else ""
    say(f"done       {step} of {total} steps ({took}{duration(seconds)}); metrics in {directory}/metrics.jsonl")
    try:
        write_report([directory], Path(directory, FILE))
        say(f"report     {directory}/{FILE}")
    except (UserError, OSError) as error:  # a full disk ends no run for its report
        say(f"report     not written: {error}")
    if saved:
        say(f"checkpoint step {saved} in {directory}/checkpoints")
    if exported:
        say(f"model      {exported}")
    say(f"again      {resume_command()}")


def describe_start(
    config: Config,
    layout: Layout,
    shape: ModelShape,
    prepared: PreparedSet,
    sampler: GlobalBatchSampler,
    total: int,
    done: int,
) -> None:
    """Versions, layout, batch arithmetic, weights per source: what a reader of the log needs to reproduce the run."""
    data, plan = config.data, sampler.step(done if done < total else 0)
    say(f"{versions()} | {layout.device.type}")
    say(f"config     {config.run.results_dir}/config.yaml")
    say(
        f"model      {config.model.path}: {num_parameters(shape) / 1e6:,.1f} M parameters, {shape.num_layers} layers, "
        f"precision {config.trainer.precision}"
    )
    adapter = config.adapter
    if trained := peft.num_parameters(shape, adapter):
        start = f", from {adapter.path}" if adapter.path else ""
        say(
            f"adapter    lora of rank {adapter.rank}, alpha {adapter.alpha:g}, on {', '.join(adapter.targets)}: "
            f"{trained / 1e6:,.2f} M parameters are trained ({trained / num_parameters(shape):.2%}){start}"
        )
    say(f"layout     {layout.describe()}" + (", sequence parallel" if config.model.sequence_parallel else ""))
    objective = config.objective
    what = f"{objective.selection}, {objective.nll_reduction}"
    if objective.stage == "fusepo":
        what = ", ".join([str(objective.loss), *(f"{name} {value}" for name, value in loss_options(objective).items())])
        if uses_reference(objective):
            what += f"; reference {objective.reference or config.model.path} ({objective.reference_mode})"
    say(f"objective  {objective.stage} ({what}); reward temperature {prepared.reward_temperature:g}")
    say(
        f"data       {data.path}: {prepared.num_prompts} prompts, {prepared.response_ids.size} sequences, "
        f"{prepared.chosen.size} pairs"
    )
    dropped = {k: v for k, v in prepared.counts.items() if v}
    if dropped:
        say("           " + ", ".join(f"{k} {v}" for k, v in dropped.items()))
    for name, value in prepared.statistics.items():
        say(f"           {name} {value:.4f}")
    say(
        f"batch      {data.global_batch_size} prompts a step = {plan.num_microbatches} micro-batches x "
        f"{data.micro_batch_size} rows x {sampler.data.seq_length} tokens x DP {layout.dp_size}; "
        f"padding {plan.padding_share:.1%} (first step)"
    )
    flops = step_flops(shape, plan.real_tokens, plan.attended_keys, plan.scored_tokens, trained)
    say(
        f"work       {flops / 1e12:,.3g} TFLOP a step, {flops / max(plan.real_tokens, 1) / 1e6:,.4g} MFLOP a token; "
        + describe_peak(layout.device_name, config.trainer.precision)
    )
    say(f"prefix     sharing {'on' if sampler.share_prefix else 'off'} ({sampler.sharing_reason})")
    say(f"steps      {total} ({sampler.steps_per_epoch} an epoch)" + (f", resuming after step {done}" if done else ""))
