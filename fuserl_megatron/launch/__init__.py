"""Starting ranks on this machine, and chains of stages here or on SLURM."""
