"""The engine, the one room that imports megatron.core.

context, logprob, rope and visibility do not: they are what its layers and its step compute with torch alone.
"""

import warnings

# core warns on every import about each optional package that is not there; `fuserl doctor` says it once
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# what core's distributed checkpoints are made of; nothing a user could change
warnings.filterwarnings("ignore", category=FutureWarning, message=r".*ShardedTensor")
# core calls these by their old names; torch blames its own wrapper, so that the module alone does not tell
warnings.filterwarnings(
    "ignore",
    category=FutureWarning,
    message=r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
)
# core's distributed optimizer keeps fp32 shards that are views of the parameters and sets their .grad itself; on the
# CPU torch blames cpu.py, through which core's calls go
warnings.filterwarnings("ignore", category=UserWarning, message=r"The \.grad attribute of a Tensor that is not a leaf")
