import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # making_helpers


@pytest.fixture(scope="session")
def reward_model_dir(tmp_path_factory):
    from making_helpers import save_reward_model

    directory = tmp_path_factory.mktemp("reward_model")
    save_reward_model(directory)
    return str(directory)
