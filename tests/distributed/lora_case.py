"""A LoRA adapter of random values beside the policy of `fusion_case`, and its twin: `peft` around transformers' model,
with the plain formulas."""

import dataclasses

import torch
from fusion_case import answers_of, loss_of, make_config

from fuserl_megatron.config.schema import AdapterConfig

LORA = AdapterConfig(kind="lora", rank=3, alpha=5.0)


def hf_model(directory, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")


def save_adapter(base, directory, **fields):
    """A PEFT directory, written by `peft`, with random A and B."""
    from peft import LoraConfig, get_peft_model

    fields = dict(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(LORA.targets)) | fields
    model = get_peft_model(hf_model(base), LoraConfig(**fields, lora_dropout=0.0, task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * (0.2 if "lora_B" in name else 0.1))
    model.save_pretrained(directory)
    return str(directory)


def peft_model(base, adapter, dtype=torch.float32):
    """The model of a directory with a PEFT adapter that is trained."""
    from peft import PeftModel

    return PeftModel.from_pretrained(hf_model(base, dtype), adapter, is_trainable=True).to(dtype)


def make_lora_config(paths, objective, adapter, mode=None, *, lora=LORA, **changes):
    """A run of `fusion_case` with the adapter; the reference is the model without it."""
    config = make_config(paths, objective, **{"seq_length": 200, **changes})
    objective = dataclasses.replace(config.objective, reference=None, reference_mode=mode)
    return dataclasses.replace(config, objective=objective, adapter=dataclasses.replace(lora, path=adapter))


def lora_twins(paths, objectives, adapter):
    """Of each objective the loss, and its gradients by PEFT's names, in float64, one sequence at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small only wait for a second thread, beside other tests for seconds
    models = [peft_model(paths["policy"], adapter, torch.float64), hf_model(paths["policy"], torch.float64)]
    factors = {n.replace(".default", ""): p for n, p in models[0].named_parameters() if p.requires_grad}
    prompts, found = answers_of(paths, models), {}
    for name, objective in objectives.items():
        loss = loss_of(objective, models, prompts)
        gradients = torch.autograd.grad(loss, list(factors.values()), retain_graph=True)
        found[name] = loss.item(), dict(zip(factors, gradients, strict=True))
    torch.set_num_threads(threads)
    return found
