"""Which rank this process is, by the variables that torchrun, our own launcher and srun set."""

import os
from collections.abc import Mapping


def own_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The rank; 0 for a process that nobody started as a rank."""
    return int(environ.get("RANK", environ.get("SLURM_PROCID", "0")))
