import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))  # fusion_case


@pytest.fixture(scope="session")
def fleet():
    """A fork server of ranks, started once."""
    from fleet import Fleet

    return Fleet()


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    from fusion_case import make_case

    return make_case(tmp_path_factory.mktemp("case"))
