"""`make rehearse-gpu`: the code for GPUs, run on a machine without one. Skipped in every other environment."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

PRESENT = "FUSERL_REHEARSAL" in os.environ  # set by the target, with the stand-in for libcuda on the library path


def pytest_collection_modifyitems(items):
    for item in items if not PRESENT else []:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs Transformer Engine: make rehearse-gpu"))


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """Sizes are multiples of 16, as FP8 wants them."""
    from fusion_case import make_case

    fields = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return make_case(tmp_path_factory.mktemp("case"), **fields)
