"""A LoRA adapter of random values beside the policy of `fusion_case`, the workers that train it on some layout, and
its twin: `peft` around transformers' model, with the plain formulas."""

import dataclasses

import torch
from fusion_case import loss_of, make_config

from fuserl_megatron.config.schema import AdapterConfig

LORA = AdapterConfig(kind="lora", rank=3, alpha=5.0)
PEFT = dict(r=3, lora_alpha=5.0, target_modules=list(LORA.targets))


def peft_model(base, adapter=None, dtype=torch.float32, **fields):
    """The model of a directory with a PEFT adapter: one that is saved, or a new one with random A and B."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True).to(dtype)
    torch.manual_seed(5)
    model = get_peft_model(model, LoraConfig(**PEFT | fields, lora_dropout=0.0, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * (0.2 if "lora_B" in name else 0.1))
    return model


def save_adapter(base, directory, **fields):
    """A PEFT directory, written by `peft`."""
    peft_model(base, **fields).save_pretrained(directory)
    return str(directory)


def with_adapter(config, **fields):
    """The run with LoRA."""
    return dataclasses.replace(config, adapter=dataclasses.replace(LORA, **fields))


def make_lora_config(paths, objective, adapter, mode=None, **changes):
    """A run of `fusion_case` with the adapter; the reference is the model without it."""
    config = make_config(paths, objective, **{"seq_length": 200, **changes})
    config = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, reference=None, reference_mode=mode)
    )
    return with_adapter(config, path=adapter)


def lora_twin(paths, objective, adapter):
    """Loss and gradients of the factors by PEFT's names, in float64, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = peft_model(paths["policy"], adapter, torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(
        paths["policy"], dtype=torch.float64, attn_implementation="eager"
    )
    loss = loss_of(paths, objective, [model, reference])
    loss.backward()
    return loss.item(), {
        name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None
    }
