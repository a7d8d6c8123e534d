"""What the tests of sampling share: waits made short, and what is kept or refused."""

import hashlib
import json
from pathlib import Path

import pytest

from fuserl_megatron.making import client, endpoint, preflight
from fuserl_megatron.making.finished import finished_rows
from fuserl_megatron.making.sample import sample
from fuserl_megatron.util.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client, "BACK_OFF_S", 0.01)
    monkeypatch.setattr(preflight, "PAUSE_S", 0.01)
    monkeypatch.setattr(client, "TICK_S", 0.02)
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(endpoint, "POLL_S", 0.05)
    monkeypatch.setattr(endpoint, "FRESH_S", 0.02)


def rows_of(config, name="a"):
    return list(finished_rows(Path(config.output) / name))


def content_of(rows):
    """What must not depend on order, time or faults."""
    own = ("key", "prompt", "source", "index", "response", "finish_reason", "seed", "meta")
    texts = sorted(json.dumps({name: row[name] for name in own}) for row in rows)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def refused(config, source, match):
    with pytest.raises(UserError, match=match) as caught:
        sample(config, [source])
    assert "\n" not in str(caught.value)
    return str(caught.value)
