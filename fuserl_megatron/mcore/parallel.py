"""Process groups: torch.distributed and core's model-parallel layout, on NCCL or gloo.

World size = TP x PP x CP x DP. Ranks of one TP group are neighbours (core's order tp-cp-dp-pp).
"""

import datetime
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fuserl_megatron.config.schema import ModelConfig, TrainerConfig
from fuserl_megatron.mcore import cpu
from fuserl_megatron.mcore.context import check_sum_rule
from fuserl_megatron.runtime.rendezvous import rendezvous_from_slurm, start_process_group
from fuserl_megatron.util.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where this rank stands. Sizes and ranks count from 0; device is where its tensors live."""

    device: torch.device
    rank: int
    world_size: int
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    cp_size: int
    cp_rank: int
    dp_size: int
    dp_rank: int
    vpp_size: int | None

    @property
    def is_last_stage(self) -> bool:
        """Losses, metrics and log-probabilities exist here only."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """The one rank that speaks and writes shared files."""
        return self.rank == 0

    @property
    def device_name(self) -> str | None:
        """The GPU's name as its driver gives it; None on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    def describe(self) -> str:
        """The layout as a product equal to the world size."""
        return (
            f"world {self.world_size} = TP {self.tp_size} x PP {self.pp_size} x CP {self.cp_size} x DP {self.dp_size}"
            + (f", {self.vpp_size} virtual stages" if self.vpp_size else "")
        )


def choose_device(accelerator: str) -> torch.device:
    """The device of this rank for trainer.accelerator = auto | cpu | gpu.

    Raises:
        UserError: gpu was asked for and torch sees none, or this host has more ranks than GPUs.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator=gpu: torch sees no GPU here. Use trainer.accelerator=cpu, "
            "or run `fuserl doctor` to see which torch build and driver are installed."
        )
    if accelerator != "cpu" and torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        count, per_host = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if count == 1 and per_host == 1:
            local_rank = 0  # srun --gpus-per-task=1 shows every rank its own GPU only
        if local_rank >= count:
            raise UserError(
                f"local rank {local_rank}: torch sees {count} GPUs on this host; start at most {count} ranks here "
                f"(--nproc {count}), or trainer.accelerator=cpu."
            )
        return torch.device("cuda", local_rank)
    if torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator=cpu: torch sees a GPU, and core would use it. Set CUDA_VISIBLE_DEVICES= (empty), too."
        )
    return torch.device("cpu")


def initialize(model: ModelConfig, trainer: TrainerConfig) -> Layout:
    """Start torch.distributed and core's process groups. One process alone needs no launcher.

    Raises:
        UserError: the world size is not a multiple of TP x PP x CP.
    """
    # before CUDA starts: core's order of communication and computation under tensor parallelism relies on it
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="megatron")
    device = choose_device(trainer.accelerator)
    rendezvous_from_slurm()
    timeout = datetime.timedelta(minutes=trainer.distributed_timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        cpu.enable()
    if not dist.is_initialized():
        start_process_group("nccl" if device.type == "cuda" else "gloo", timeout)
    from megatron.core import parallel_state as ps
    from megatron.core import tensor_parallel

    world = dist.get_world_size()
    tp, pp, cp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
    if world % (tp * pp * cp):
        raise UserError(
            f"{world} ranks cannot hold TP {tp} x PP {pp} x CP {cp} = {tp * pp * cp}: "
            f"start a multiple of {tp * pp * cp} ranks (--nproc {tp * pp * cp})."
        )
    ps.initialize_model_parallel(
        tp,
        pp,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        context_parallel_size=cp,
        distributed_timeout_minutes=max(1, int(trainer.distributed_timeout_minutes)),
    )
    if cp > 1:
        check_sum_rule(ps.get_context_parallel_group(), device)
    # nothing in training is random: the tracker that does nothing spares the CUDA generator (and dropout is always 0)
    tensor_parallel.model_parallel_cuda_manual_seed(1, inference_rng_tracker=True)
    return Layout(
        device=device,
        rank=dist.get_rank(),
        world_size=world,
        tp_size=tp,
        tp_rank=ps.get_tensor_model_parallel_rank(),
        pp_size=pp,
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        cp_size=cp,
        cp_rank=ps.get_context_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        vpp_size=model.virtual_pipeline_model_parallel_size,
    )


def shutdown() -> None:
    """Leave the process groups; safe to call when none were made."""
    if dist.is_initialized():
        from megatron.core import parallel_state as ps

        ps.destroy_model_parallel()
        dist.destroy_process_group()
