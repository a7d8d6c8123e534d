"""The one room that imports megatron.core."""

import warnings

# core warns on every import about each optional package that is not there; `fuserl doctor` says it once, with what
# to do
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# what core's distributed checkpoints are made of; nothing a user could change
warnings.filterwarnings("ignore", category=FutureWarning, message=r".*ShardedTensor")
