import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))  # fusion_case, also for tests elsewhere
# A job that a shell script starts in the background ignores SIGINT, and so would every program that a test interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ranks():
    """Gloo workers shared by the whole session: torch and megatron-core are imported once per worker."""
    from fuserl_megatron.testing.distributed import Ranks

    with Ranks() as pool:
        yield pool


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """Paths of a tiny policy and reference and of a data set."""
    from fusion_case import make_case

    return make_case(tmp_path_factory.mktemp("case"))
