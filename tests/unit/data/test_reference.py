"""The cache of reference log-probabilities: keyed, resumable, never half-written."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fuserl_megatron.data.reference import ReferenceCache, hash_model_directory, reference_key
from fuserl_megatron.util import files
from fuserl_megatron.util.errors import UserError


def test_write_resume_finish_and_read(tmp_path):
    cache = ReferenceCache.open_or_create(tmp_path / "c", "key", 6)
    assert cache.missing_mask.all() and not cache.complete
    cache.write(torch.tensor([4, 1]), torch.tensor([-4.5, -1.25], dtype=torch.float64))
    cache.flush()
    del cache
    again = ReferenceCache.open_or_create(tmp_path / "c", "key", 6)
    assert again.missing_mask.tolist() == [True, False, True, True, False, True]
    with pytest.raises(ValueError, match="1 responses have no reference log-probability, the first is 0"):
        again.finish(np.array([0, 1]))
    again.write([0], [0.0])
    again.finish(np.array([0, 1, 4]))
    reader = ReferenceCache.open(tmp_path / "c", "key", 6)
    assert reader.complete
    values = reader.lookup(torch.tensor([1, 4, 0]))
    assert values.dtype == torch.float32 and values.tolist() == [-1.25, -4.5, 0.0]
    assert reader.lookup(torch.tensor([], dtype=torch.int64)).numel() == 0
    with pytest.raises(UserError, match="response 5 has no reference log-probability"):
        reader.lookup(torch.tensor([1, 5]))
    with pytest.raises(ValueError, match="read-only"):
        reader.write([1], [-1.0])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_non_finite_value_is_refused_with_its_response(tmp_path, value):
    cache = ReferenceCache.open_or_create(tmp_path, "key", 3)
    with pytest.raises(UserError, match=r"non-finite log-probability for responses \[2\]"):
        cache.write(torch.tensor([1, 2]), torch.tensor([-1.0, value]))
    assert cache.missing_mask.all()


def test_mismatch_and_damage_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="run the scoring pass first"):
        ReferenceCache.open(tmp_path / "c", "key", 3)
    ReferenceCache.open_or_create(tmp_path / "c", "key", 3).write([0], [-1.0])

    def refused(says, key="key", size=3):
        with pytest.raises(UserError, match=says) as error:
            ReferenceCache.open_or_create(tmp_path / "c", key, size)
        assert "\n" not in str(error.value) and str(tmp_path / "c") in str(error.value)

    refused("another reference model, data set, tokenizer, template or precision: delete it", key="other")
    refused("damaged", size=4)
    (tmp_path / "c" / "reference_logps.f32").write_bytes(b"1234")
    refused("damaged")
    (tmp_path / "c" / "reference.json").write_text("{")
    refused("damaged")


def test_an_interrupted_creation_is_no_cache(tmp_path, monkeypatch):
    def stop(file):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", stop)
        with pytest.raises(KeyboardInterrupt):
            ReferenceCache.open_or_create(tmp_path / "c", "key", 3)
    assert list((tmp_path / "c").iterdir()) == []
    assert ReferenceCache.open_or_create(tmp_path / "c", "key", 3).missing_mask.all()


@pytest.mark.parametrize("size", [1, 1000])
def test_size_of_a_new_cache(tmp_path, size):
    cache = ReferenceCache.open_or_create(tmp_path, "key", size)
    assert cache.missing_mask.all() and (tmp_path / "reference_logps.f32").stat().st_size == 4 * size


def test_the_key_follows_model_data_tokenizer_template_and_precision(tmp_path, build_dataset, make_record):
    model = tmp_path / "model"
    with pytest.raises(UserError, match="not a Hugging Face model directory"):
        hash_model_directory(model)
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(UserError, match="holds no .safetensors file"):
        hash_model_directory(model)
    (model / "a.safetensors").write_bytes(b"1")
    (model / "b.safetensors").write_bytes(b"2")
    first = hash_model_directory(model)
    (model / "README.md").write_text("not part of it")
    assert hash_model_directory(model) == first
    (model / "b.safetensors").write_bytes(b"3")
    assert hash_model_directory(model) != first

    manifest = build_dataset([make_record()]).manifest
    keys = {
        reference_key("m", manifest, "32"),
        reference_key("n", manifest, "32"),
        reference_key("m", manifest, "bf16"),
        reference_key("m", replace(manifest, hash="x"), "32"),
        reference_key("m", replace(manifest, tokenizer_hash="x"), "32"),
        reference_key("m", replace(manifest, chat_template_hash="x"), "32"),
    }
    assert len(keys) == 6
