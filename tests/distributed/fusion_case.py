"""One small fusion problem for the layout tests, the worker that runs it on some layout, and a float64 twin written
plainly."""

import json
import random

import torch

from fuserl_megatron.config.schema import (
    BuildConfig,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PackingConfig,
    RunConfig,
    TrainerConfig,
)

TAU = 0.05
SFT = dict(stage="fusesft")
DPO = dict(stage="fusepo", loss="dpo", beta=0.3)


def make_case(directory, *, num_prompts=7, tie=False, seed=0, **model_fields):
    """Policy, reference (other weights), data set with ragged prompts, responses, sources and rewards."""
    from fuserl_megatron.data.build import build
    from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model

    paths = {name: str(directory / name) for name in ("policy", "reference", "data")}
    save_tiny_model(paths["policy"], seed=1, tie_word_embeddings=tie, **model_fields)
    save_tiny_model(paths["reference"], seed=2, tie_word_embeddings=tie, **model_fields)
    save_char_tokenizer(paths["policy"])
    rng = random.Random(seed)
    records = []
    for p in range(num_prompts):
        prompt = f"question {p}: " + "x" * rng.randint(0, 9)
        for source in ["alpha", "beta", "gamma"][: 3 if p != 2 else 2]:  # one source missing once
            for n in range(rng.randint(2, 3)):
                response = "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 14)))
                records.append(dict(prompt=prompt, source=source, response=response + str(n), reward=rng.random()))
    (directory / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    build(
        BuildConfig(
            inputs=(str(directory / "records.jsonl"),),
            output=paths["data"],
            tokenizer=paths["policy"],
            reward_temperature=TAU,
            max_length=96,
        ),
        progress=False,
    )
    return paths


def make_config(
    paths,
    objective,
    *,
    tp=1,
    pp=1,
    sp=False,
    rows=2,
    seq_length=160,
    packing=True,
    share="off",
    distopt=False,
    global_batch_size=7,
    max_steps=1,
    recompute="none",
    vpp=None,
    results_dir="unused",
    every=0,
    precision="32",
    lr=1e-3,
):
    from fuserl_megatron.config.schema import CheckpointConfig, ExpManagerConfig, SchedConfig

    return Config(
        run=RunConfig(results_dir=results_dir),
        exp_manager=ExpManagerConfig(
            create_tensorboard_logger=False, checkpoint_callback_params=CheckpointConfig(every_n_train_steps=every)
        ),
        trainer=TrainerConfig(precision=precision, max_steps=max_steps, max_epochs=None),
        model=ModelConfig(
            path=paths["policy"],
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            sequence_parallel=sp,
            logprob_chunk_size=29,
            recompute_granularity=recompute,
        ),
        data=DataConfig(
            path=paths["data"],
            seq_length=seq_length,
            micro_batch_size=rows,
            global_batch_size=global_batch_size,
            packing=PackingConfig(enabled=packing, share_prefix=share),
        ),
        objective=ObjectiveConfig(
            **objective, **({"reference": paths["reference"]} if objective["stage"] == "fusepo" else {})
        ),
        optim=OptimConfig(use_distributed_optimizer=distopt, lr=lr, sched=SchedConfig(name="cosine", warmup_ratio=0.0)),
    )


def loss_and_gradients(config, reference_dir):
    """Loss, metrics, gradient norm and (rank 0) gradients by HF name of the first step."""
    import dataclasses
    from pathlib import Path

    from fuserl_megatron.convert.hf_config import read_config
    from fuserl_megatron.data.dataset import FusedDataset
    from fuserl_megatron.data.pairs import prepare
    from fuserl_megatron.data.sampler import GlobalBatchSampler
    from fuserl_megatron.mcore import model as m
    from fuserl_megatron.mcore import parallel, step, weights
    from fuserl_megatron.mcore.optimizer import build_optimizer, gradient_norm
    from fuserl_megatron.train.loop import _reference, with_loss_defaults

    config = with_loss_defaults(config)
    layout = parallel.initialize(config.model, config.trainer)
    dataset = FusedDataset(config.data.path)
    prepared = prepare(dataset, config.objective)
    sampler = GlobalBatchSampler(prepared, config.data, 0, layout.dp_size, layout.pp_size if layout.vpp_size else 1)
    target = m.build_model(read_config(config.model.path), config.model, layout, torch.float32)
    engine = step.Engine(
        target=target,
        layout=layout,
        objective=config.objective,
        source_names=dataset.sources,
        logprob_chunk_size=config.model.logprob_chunk_size,
    )
    reference = None
    if config.objective.stage == "fusepo":
        reference = _reference(config, engine, prepared, sampler, Path(reference_dir))
    weights.load_hf_weights(target, config.model.path, layout)
    wrapped = m.wrap_for_training(target, config.optim)
    engine = dataclasses.replace(
        engine, wrapped=wrapped, optimizer=build_optimizer(wrapped, config.optim, config.trainer, torch.float32)
    )
    plan = sampler.step(0)
    normalizer = float(plan.num_prompts)
    if config.objective.nll_reduction == "weighted_token_mean":
        normalizer = plan.sum_weighted_tokens
    loss, metrics = step.forward_backward(engine, sampler.micro_batches(plan, layout.dp_rank, reference), normalizer)
    grads = None
    if not config.optim.use_distributed_optimizer:
        grads = {
            name: g.double()
            for name, g in weights.gather_hf_tensors(target, layout, lambda p: p.main_grad.detach().clone())
        }
    return loss, metrics, gradient_norm(engine.optimizer), grads, plan.num_microbatches


# --- the twin: one sequence at a time through transformers in float64, the formulas of METHOD word for word
# ---------------------
def _sequence_nll(model, prompt, response):
    tokens = torch.tensor([list(prompt) + list(response)])
    logps = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    return -sum(logps[len(prompt) + t - 1, token] for t, token in enumerate(response))


def twin(paths, objective, dtype=torch.float64):
    """Loss and gradients by HF name of all prompts in one batch."""
    import math

    from transformers import AutoModelForCausalLM

    from fuserl_megatron.data.dataset import FusedDataset

    policy = AutoModelForCausalLM.from_pretrained(paths["policy"], dtype=torch.float64, attn_implementation="eager")
    reference = AutoModelForCausalLM.from_pretrained(
        paths["reference"], dtype=torch.float64, attn_implementation="eager"
    )
    data = FusedDataset(paths["data"])
    total, weighted_tokens, prompts = 0.0, 0.0, 0
    for g in range(data.num_groups):
        group = data.group(g)
        by_source = {}
        for response, source, reward in zip(group.responses, group.source_ids, group.rewards, strict=True):
            by_source.setdefault(int(source), []).append((float(reward), response.tolist()))
        prompt = group.prompt_tokens.tolist()
        scores = {k: max(r for r, _ in v) for k, v in by_source.items()}
        z = sum(math.exp(s / TAU) for s in scores.values())
        prompts += 1
        for k, answers in by_source.items():
            weight = math.exp(scores[k] / TAU) / z
            best, worst = max(answers)[1], min(answers)[1]
            if objective["stage"] == "fusesft":
                nll = _sequence_nll(policy, prompt, best)
                reduction = objective.get("nll_reduction", "token_mean")
                total = total + weight * (nll / len(best) if reduction == "token_mean" else nll)
                weighted_tokens += weight * len(best)
            else:
                with torch.no_grad():
                    ref = _sequence_nll(reference, prompt, worst) - _sequence_nll(reference, prompt, best)
                delta = _sequence_nll(policy, prompt, worst) - _sequence_nll(policy, prompt, best)
                total = total + weight * -torch.nn.functional.logsigmoid(objective["beta"] * (delta - ref))
    loss = total / (weighted_tokens if objective.get("nll_reduction") == "weighted_token_mean" else prompts)
    loss.backward()
    grads = {n: p.grad for n, p in policy.named_parameters()}
    return loss.item(), grads


def worst_relative_error(actual, expected):
    """Largest over tensors of max|a - e| / max|e|."""
    assert actual.keys() == expected.keys()
    return max(((actual[n] - e).abs().max() / e.abs().max()).item() for n, e in expected.items())
