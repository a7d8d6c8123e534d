import pytest


@pytest.fixture(scope="session")
def ranks():
    """Gloo workers shared by the whole session: torch and megatron-core are imported once per worker."""
    from fuserl_megatron.testing.distributed import Ranks

    with Ranks() as pool:
        yield pool
