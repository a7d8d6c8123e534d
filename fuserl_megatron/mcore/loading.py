"""A model and its optimizer filled from a checkpoint of any layout, without core's loader.

Core says what is wanted (a sharded state dict: which part of which key each tensor is); the files are read by
checkpoint/reader.py and safe_load.py, so that what is checked is what is used and nothing a checkpoint names is called.
Writing is split in the same way (saving.py).
"""

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8

from fuserl_megatron.checkpoint.reader import DistReader
from fuserl_megatron.checkpoint.safe_load import read_common
from fuserl_megatron.checkpoint.torch_dist import COMMON
from fuserl_megatron.util.errors import UserError


def load_state(state: dict[str, Any], folder: str | Path, advice: str) -> dict[str, Any]:
    """Fill core's sharded state dict from one iteration's folder; this rank's parts alone, no word to other ranks.

    Args:
        state: as `sharded_state_dict` gives it. Its tensors are filled in place, whatever dtype is stored.
        folder: of the iteration.
        advice: the end of the line that says that model and checkpoint do not belong together.

    Returns:
        A state dict for `load_state_dict`, the checkpoint's plain values merged in where it has them.

    Raises:
        UserError: the checkpoint lacks a key, holds another size of it, is damaged, or names anything foreign.
    """
    force_all_tensors_to_non_fp8(state)
    sharded, plain, factories = load_preprocess(state)
    sharded, _ = extract_sharded_base(sharded)
    # core 0.19 by itself writes no such file; this package always does
    loaded = read_common(folder) if (Path(folder) / COMMON).exists() else {}
    merge(loaded, plain)
    with DistReader(folder) as reader:
        dict_list_map_inplace(lambda part: _filled(part, reader, advice), sharded)
    merge(loaded, sharded)
    return apply_factory_merges(loaded, factories)


def _filled(part: ShardedTensor | ShardedObject, reader: DistReader, advice: str) -> Any:
    if isinstance(part, ShardedObject):
        return reader.read_object(part.unique_key)
    stored = reader.keys.get(part.key)
    if stored is None:
        raise UserError(f"{reader.directory}: holds no {part.key}, which this model has{advice}")
    part.init_data("cpu")
    out = part.data.detach()
    whole = tuple(part.global_shape)
    if part.allow_shape_mismatch:  # rows of padding that the other layout has not
        out.zero_()
        whole = stored.size if len(stored.size) == len(whole) else whole
    if stored.size != whole:
        raise UserError(
            f"{reader.directory}: {part.key} has size {list(stored.size)}, not the model's {list(whole)}{advice}"
        )
    region = out.view((1,) * part.prepend_axis_num + tuple(part.local_shape))
    for dim, (start, size) in enumerate(zip(part.global_offset, whole, strict=True)):
        if start + region.shape[dim] > size:  # past the end of what is stored
            region = region.narrow(dim, 0, max(0, size - start))
    reader.read_region(part.key, part.global_offset, region)
    return out
