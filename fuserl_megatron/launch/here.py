"""A command that needs ranks: how many, whether this process is one of them, and how they are started here."""

import argparse
import os
import sys

from fuserl_megatron.config.derived import replica_ranks
from fuserl_megatron.config.schema import Config
from fuserl_megatron.launch import ranks
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.ports import free_port


def num_ranks_of(options: argparse.Namespace, config: Config) -> int:
    """Ranks that a launcher started, that --nproc asks for, or that the layout needs."""
    is_rank = ranks.is_rank()
    if is_rank and options.nproc is not None:
        raise UserError("--nproc: torchrun or srun has started the ranks already; leave it out.")
    smallest = replica_ranks(config.model)
    num_ranks = ranks.launched_world_size() if is_rank else smallest if options.nproc is None else options.nproc
    if options.nproc is not None and options.nproc < 1:
        raise UserError(f"--nproc {options.nproc}: must be at least 1; --nproc {max(smallest, 1)} would work.")
    return num_ranks


def becomes_rank(config: Config, num_ranks: int) -> bool:
    """Whether this process is to be a rank itself, made ready for it; the environment of ranks is made ready, too."""
    if config.trainer.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # core takes any GPU it sees
    is_rank = ranks.is_rank()
    if not is_rank and num_ranks == 1:  # in an sbatch script without srun, SLURM's variables describe other ranks
        os.environ.update(ranks.rank_environment(0, 1, free_port()))
    return is_rank or num_ranks == 1


def start_ranks(options: argparse.Namespace, num_ranks: int, *words: str, save_on_ctrl_c: bool = False) -> int:
    """This command once more in every rank: `words`, the overrides and where the configuration is."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # what has a hub name is in the cache by now: the ranks ask nobody
    command = [sys.executable, "-m", "fuserl_megatron.cli", *words, *options.overrides]
    for name in ("config_dir", "config_name"):
        if getattr(options, name) is not None:
            command.append(f"--{name.replace('_', '-')}={getattr(options, name)}")
    return ranks.run_ranks(command, num_ranks, save_on_ctrl_c=save_on_ctrl_c)
