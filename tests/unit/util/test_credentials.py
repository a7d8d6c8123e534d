"""What is taken for a credential, and what is not."""

import pytest

from fuserl_megatron.util.credentials import redact, refuse_secrets
from fuserl_megatron.util.errors import UserError


@pytest.mark.parametrize("name", ["HF_TOKEN", "MY_API_KEY", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "CREDENTIALS"])
def test_a_word_of_the_name_makes_a_credential(monkeypatch, name):
    monkeypatch.setenv(name, "canary-123456")
    with pytest.raises(UserError, match=rf"run\.name: holds the value of \${name}"):
        refuse_secrets({"run": {"name": "x canary-123456 y"}})
    assert redact("at canary-123456") == f"at ${name}"


@pytest.mark.parametrize("name", ["TOKENIZER_PATH", "MODEL_TOKENIZERS", "MAX_TOKENS_PER_BATCH", "SECRETARY"])
def test_other_names_hold_none(monkeypatch, name):
    monkeypatch.setenv(name, "models/llama-3")
    refuse_secrets({"tokenizer": "models/llama-3"})


def test_an_existing_path_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", str(tmp_path))
    refuse_secrets({"tokenizer": str(tmp_path)})


@pytest.mark.parametrize("value", ["WANDB_API_KEY=abc", "HF_TOKEN=x", "db_password=hunter2"])
def test_an_assignment_to_one_is_refused_without_its_value(value):
    with pytest.raises(UserError, match=r"cluster\.env: gives \w+ a value") as error:
        refuse_secrets({"cluster": {"env": ["NCCL_DEBUG=WARN", value]}})
    assert value not in str(error.value)
