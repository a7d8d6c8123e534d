import pytest


@pytest.fixture(scope="session")
def fleet():
    """A fork server of ranks, started once."""
    from fleet import Fleet

    return Fleet()
