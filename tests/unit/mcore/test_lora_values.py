"""An adapter's first values: by name and seed, whatever the layout."""

import math

import torch

from fuserl_megatron.convert.peft import Factor
from fuserl_megatron.mcore.lora import first_value

A = Factor("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (16, 400), None)


def test_first_values():
    value = first_value(A, 1)
    assert torch.equal(value, first_value(A, 1))
    assert not torch.equal(value, first_value(A, 2))
    other = Factor(A.name.replace("layers.0", "layers.1"), A.size, None)
    assert not torch.equal(value, first_value(other, 1))
    assert math.isclose(value.std().item(), 1 / 20 / math.sqrt(3), rel_tol=0.05)
    assert not first_value(Factor(A.name.replace("lora_A", "lora_B"), (400, 16), 0), 1).any()
