"""One small fusion problem for the layout tests, the worker that runs it on some layout, and a float64 twin written
plainly."""

import functools
import json
import math
import random

import torch
from groups import read_group

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
LOSSES = {
    "simpo": dict(stage="fusepo", loss="simpo", beta=2.0, gamma_beta_ratio=0.3),
    "rloo": dict(stage="fusepo", loss="rloo", kl_coef=0.02),
    "wrpo": dict(stage="fusepo", loss="wrpo", beta=0.1, alpha_end=0.6, target_source="gamma"),
    "kto": dict(stage="fusepo", loss="kto", beta=0.02, undesirable_weight=1.5),
    "orpo": dict(stage="fusepo", loss="orpo", beta=0.5),
    "mappo": dict(stage="fusepo", loss="mappo", beta=0.1, rpo_alpha=0.2),
    "infifpo": dict(stage="fusepo", loss="infifpo", beta=2.0),
    "dpo with an sft term": dict(stage="fusepo", loss="dpo", beta=0.3, rpo_alpha=0.7),
    "ln_dpo": dict(stage="fusepo", loss="ln_dpo", beta=5.0),
    "cdpo": dict(stage="fusepo", loss="cdpo", beta=0.2, label_smoothing=0.1),
    "robust": dict(stage="fusepo", loss="robust", beta=0.2, label_smoothing=0.2),
    "hinge": dict(stage="fusepo", loss="hinge", beta=0.2),
    "ipo per token": dict(stage="fusepo", loss="ipo", beta=0.4, length_normalized=True),
    "ipo summed": dict(stage="fusepo", loss="ipo", beta=0.1, length_normalized=False),
    "cpo": dict(stage="fusepo", loss="cpo", beta=0.1, cpo_alpha=0.6),
    "exo": dict(stage="fusepo", loss="exo", beta=0.2, label_smoothing=0.1),
    "discopop": dict(stage="fusepo", loss="discopop", beta=0.2, discopop_tau=0.5),
    "apo_zero": dict(stage="fusepo", loss="apo_zero", beta=0.2),
    "apo_down": dict(stage="fusepo", loss="apo_down", beta=0.2),
    "nca": dict(stage="fusepo", loss="nca", beta=0.2),
    "bco": dict(stage="fusepo", loss="bco", beta=0.2, delta=0.3),
    "sppo": dict(stage="fusepo", loss="sppo", beta=0.2),
    "mpo": dict(stage="fusepo", loss="mpo", beta=0.2, preference_weight=0.8, bco_weight=0.2, rpo_alpha=0.6),
}
STEP, TOTAL = 1, 2
"""WRPO's alpha is taken as in the second of two steps: half of alpha_end."""


def make_case(directory, *, num_prompts=7, tie=False, seed=0, **model_fields):
    """Policy, reference (other weights), data set with ragged prompts, responses, sources and rewards."""
    from fuserl_megatron.records.build import build
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
                logps = {"alpha": -0.5 - 0.1 * ((p + n) % 7), "beta": -3.0 - 0.2 * ((p * n) % 5)}
                record = dict(prompt=prompt, source=source, response=response + str(n), reward=rng.random())
                records.append(record | dict(source_mean_logps=logps))
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
    cp=1,
    sp=False,
    rows=2,
    seq_length=160,
    packing=True,
    share="off",
    distopt=False,
    overlap=False,
    sched="cosine",
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
            context_parallel_size=cp,
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
        objective=_with_reference(ObjectiveConfig(**objective), paths),
        optim=OptimConfig(
            use_distributed_optimizer=distopt,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and distopt,
            lr=lr,
            sched=SchedConfig(name=sched, warmup_ratio=0.0),
        ),
    )


def _with_reference(objective, paths):
    import dataclasses

    from fuserl_megatron.config.objective import uses_reference

    return dataclasses.replace(objective, reference=paths["reference"]) if uses_reference(objective) else objective


def loss_and_gradients(config, reference_dir, sampler_step=0):
    """Loss, metrics, gradient norm, (rank 0) gradients by HF name, micro-batches and prompts of one step."""
    from fuserl_megatron.mcore import lora, parallel, step, weights
    from fuserl_megatron.mcore.optimizer import gradient_norm
    from fuserl_megatron.train import feed as f
    from fuserl_megatron.train.checks import check_batches, check_prepared

    config, shape, (dataset,) = f.open_run(config, [config.data.path])
    layout = parallel.initialize(config.model, config.trainer)
    feed = f.make_feed(config, dataset, layout, str(reference_dir))
    check_prepared(config, feed.prepared)
    engine = f.make_engine(config, layout, shape, dataset.sources)
    (feed,) = f.with_references(config, engine, [feed])
    weights.load_hf_weights(engine.target, config.model.path, layout)
    engine = f.with_optimizer(config, engine)
    plan = feed.sampler.step(sampler_step)
    normalizer = plan.normalizer(config.objective.nll_reduction)
    batches = feed.batches(plan, layout.dp_rank)
    check_batches(config, feed.prepared.unit, batches, layout)
    values = f.step_values(config, engine, feed, plan, STEP, TOTAL)
    loss, metrics = step.forward_backward(engine, batches, normalizer, values)
    grads = None
    if not config.optim.use_distributed_optimizer:
        gather = lora.gather_adapters if lora.adapters_of(engine.target) else weights.gather_hf_tensors
        found = gather(engine.target, layout, lambda p: p.main_grad.detach().clone())
        grads = {name: g.double() for name, g in dict(found).items()}
    return loss, metrics, gradient_norm(engine.optimizer), grads, plan.num_microbatches, plan.num_prompts


def run(config):
    from fuserl_megatron.train.loop import train

    return train(config)


def several(configs, reference_dir):
    """`loss_and_gradients` of each config, in one job of the ranks."""
    from megatron.core import parallel_state as ps

    found = []
    for config in configs:
        found.append(loss_and_gradients(config, reference_dir))
        ps.destroy_model_parallel()
    return found


# --- the twin: one sequence at a time through transformers in float64, the formulas of METHOD word for word
# ---------------------
def _sequence_nll(model, prompt, response):
    tokens = torch.tensor([list(prompt) + list(response)])
    logps = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    return -sum(logps[len(prompt) + t - 1, token] for t, token in enumerate(response))


class Answer:
    """One response: reward r, tokens, |y|, log pi with gradient and h = log pi - log pi_ref when asked for."""

    def __init__(self, models, prompt, reward, tokens, logps=None):
        self.models, self.prompt, self.reward, self.tokens, self.length = models, prompt, reward, tokens, len(tokens)
        self.source_mean_logps = logps

    def __lt__(self, other):
        return (self.reward, self.tokens) < (other.reward, other.tokens)

    @functools.cached_property
    def logp(self):
        return -_sequence_nll(self.models[0], self.prompt, self.tokens)

    @functools.cached_property
    def reference(self):
        with torch.no_grad():
            return -_sequence_nll(self.models[1], self.prompt, self.tokens)

    @property
    def h(self):
        return self.logp - self.reference

    @property
    def mean(self):
        return self.logp / self.length


def preference_loss(objective, answers, kl):
    """l_PO(x, Y_k) of one source's answers."""
    beta, best, worst = objective.get("beta"), max(answers), min(answers)
    log_s, log = torch.nn.functional.logsigmoid, torch.log
    d, e = best.h - worst.h, objective.get("label_smoothing")
    match objective["loss"]:
        case "dpo":
            return -log_s(beta * d) - objective.get("rpo_alpha", 0) * best.mean
        case "ln_dpo":
            return -log_s(beta * (best.h / best.length - worst.h / worst.length))
        case "cdpo":
            return -(1 - e) * log_s(beta * d) - e * log_s(-beta * d)
        case "robust":
            return (-(1 - e) * log_s(beta * d) + e * log_s(-beta * d)) / (1 - 2 * e)
        case "hinge":
            return torch.clamp(1 - beta * d, min=0)
        case "exo":
            q, p = torch.sigmoid(torch.stack([beta * d, -beta * d])), torch.tensor([1 - e, e])
            return (q * log(q / p)).sum()
        case "discopop":
            m = torch.sigmoid(beta * d / objective["discopop_tau"])
            return -(1 - m) * log_s(beta * d) + m * torch.exp(-beta * d)
        case "apo_zero":
            return 1 - torch.sigmoid(beta * best.h) + torch.sigmoid(beta * worst.h)
        case "apo_down":
            return torch.sigmoid(beta * best.h) + 1 - torch.sigmoid(beta * d)
        case "nca":
            return -log_s(beta * best.h) - (log_s(-beta * best.h) + log_s(-beta * worst.h)) / 2
        case "bco":
            return -log_s(beta * best.h - objective["delta"]) - log_s(objective["delta"] - beta * worst.h)
        case "sppo":
            return (best.h - 1 / (2 * beta)) ** 2 + (worst.h + 1 / (2 * beta)) ** 2
        case "mpo":
            quality = -log_s(beta * best.h) - log_s(-beta * worst.h)
            preference = -objective["preference_weight"] * log_s(beta * d)
            return preference + objective["bco_weight"] * quality - objective["rpo_alpha"] * best.mean
        case "ipo":
            if objective["length_normalized"]:
                d = best.h / best.length - worst.h / worst.length
            return (d - 1 / (2 * beta)) ** 2
        case "cpo":
            return -log_s(beta * (best.logp - worst.logp)) - objective["cpo_alpha"] * best.mean
        case "simpo":
            return -log_s(beta * best.mean - beta * worst.mean - beta * objective["gamma_beta_ratio"])
        case "orpo":
            odds = best.mean - worst.mean - (log(1 - best.mean.exp()) - log(1 - worst.mean.exp()))
            return -best.mean - beta * log_s(odds)
        case "mappo":
            gap = best.reward - worst.reward
            return -log_s(beta * best.h - gap * beta * worst.h) - objective["rpo_alpha"] * best.mean
        case "kto":
            good = 1 - torch.sigmoid(beta * (best.h - kl))
            bad = 1 - torch.sigmoid(beta * (kl - worst.h))
            return (good + objective["undesirable_weight"] * bad) / 2
        case "rloo":
            n = len(answers)
            rewards, mean_h = [a.reward for a in answers], sum(a.h for a in answers) / n
            losses = []
            for a in answers:
                advantage = a.reward - (sum(rewards) - a.reward) / (n - 1)
                penalty = objective["kl_coef"] / 2 * (a.h - mean_h) ** 2 / (n - 1)
                losses.append(-advantage * a.logp / n + penalty)
            return sum(losses)
        case "infifpo":
            fused = []
            for answer, clip in ((best, max), (worst, min)):
                initial = answer.reference.item() / answer.length
                values = [clip(v, initial) for v in answer.source_mean_logps if not math.isnan(v)]
                fused.append(max(values, key=lambda v: abs(v - initial)))
            return -log_s(beta * (best.mean - fused[0]) - beta * (worst.mean - fused[1]))


def mismatched_kl(models, prompts):
    """max(0, mean h of every prompt's best and worst answers under the next prompt), answers cut to the longest row."""
    used = [[a for answers in by_source for a in (max(answers), min(answers))] for _, by_source in prompts]
    longest = max(len(prompt) + a.length for (prompt, _), mine in zip(prompts, used, strict=True) for a in mine)
    found = []
    with torch.no_grad():
        for (following, _), mine in zip(prompts[1:] + prompts[:1], used, strict=True):
            for a in mine:
                found.append(Answer(models, following, a.reward, a.tokens[: longest - len(following)]).h.item())
    return max(0.0, sum(found) / len(found))


def twin(paths, objective, dtype=torch.float64):
    """Loss and gradients by HF name of all prompts in one batch."""
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(paths[name], dtype=dtype, attn_implementation="eager")
        for name in ("policy", "reference")
    ]
    loss = loss_of(objective, models, answers_of(paths, models))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in models[0].named_parameters()}


def answers_of(paths, models):
    """Prompts with their answers by source; models are policy and reference."""
    from fuserl_megatron.data.dataset import FusedDataset

    data, prompts = FusedDataset(paths["data"]), []
    for g in range(data.num_groups):
        group = read_group(data, g)
        prompt, by_source = group.prompt_tokens.tolist(), {}
        for n, (response, source, reward) in enumerate(
            zip(group.responses, group.source_ids, group.rewards, strict=True)
        ):
            logps = data.source_mean_logps[group.first_response_id + n].tolist()
            answer = Answer(models, prompt, float(reward), response.tolist(), logps)
            by_source.setdefault(data.sources[source], []).append(answer)
        prompts.append((prompt, by_source))
    return prompts


def loss_of(objective, models, prompts):
    """The loss of all prompts in one batch."""
    total, weighted_tokens, counted = 0.0, 0.0, 0
    kl = mismatched_kl(models, [(p, list(s.values())) for p, s in prompts]) if objective.get("loss") == "kto" else None
    for _, by_source in prompts:
        if objective.get("loss") == "wrpo":
            others = dict(by_source)
            own = others.pop(objective["target_source"], None)
            if own is None:
                continue
            alpha, strongest = objective["alpha_end"] * STEP / TOTAL, max(a for s in others.values() for a in s)
            z = alpha * strongest.h + (1 - alpha) * max(own).h - min(own).h
            total = total - torch.nn.functional.logsigmoid(objective["beta"] * z)
            counted += 1
            continue
        counted += 1
        exps = {k: math.exp(max(answers).reward / TAU) for k, answers in by_source.items()}
        for k, answers in by_source.items():
            weight = exps[k] / sum(exps.values())
            if objective["stage"] == "fusepo":
                total = total + weight * preference_loss(objective, answers, kl)
                continue
            best = max(answers)
            reduction = objective.get("nll_reduction", "token_mean")
            total = total - weight * (best.mean if reduction == "token_mean" else best.logp)
            weighted_tokens += weight * best.length
    return total / (weighted_tokens if objective.get("nll_reduction") == "weighted_token_mean" else counted)


def worst_relative_error(actual, expected):
    """Largest over tensors of max|a - e| / max|e|."""
    assert actual.keys() == expected.keys()
    return max(((actual[n] - e).abs().max() / e.abs().max()).item() for n, e in expected.items())
