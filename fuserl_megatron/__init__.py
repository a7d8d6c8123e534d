"""FuseRL on Megatron-core: fuse several strong language models into one smaller target (arXiv 2504.06562).

Importing this package loads neither torch nor megatron; every room is imported by name
(`fuserl_megatron.objectives`, `fuserl_megatron.data`, ...).
"""

__version__ = "0.1.0"
