"""Starting ranks: this machine, SLURM, NeMo."""
