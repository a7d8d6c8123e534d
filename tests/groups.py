"""One group of a fused data set, read through its public arrays: for the slow twins of the tests."""

from typing import NamedTuple

import numpy as np


class Group(NamedTuple):
    """One prompt with its responses."""

    prompt_tokens: np.ndarray
    responses: list[np.ndarray]
    source_ids: np.ndarray
    rewards: np.ndarray
    first_response_id: int


def read_group(data, i):
    start, stop = data.response_offsets[i : i + 2].tolist()
    responses = [data.response(i, r) for r in range(start, stop)]
    return Group(data.prompt(i), responses, data.source_ids[start:stop], data.rewards[start:stop], start)
