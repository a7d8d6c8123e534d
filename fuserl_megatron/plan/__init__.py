"""Memory and time of a run on GPUs, worked out without one."""
