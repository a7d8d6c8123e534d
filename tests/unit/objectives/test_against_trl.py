"""Loss and gradients of TRL's own trainers and of our functions, on the same tiny model and batch, weight 1 per pair.

TRL's side is its trainer, its collator and its forward pass; ours is a plain forward pass, our sequence sums and our
loss, averaged over pairs (TRL's normalisation). Each test names the definition we follow where TRL's differs.
"""

import copy
import os

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl accelerate")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from fuserl_megatron.objectives import absolute, group_losses, preference  # noqa: E402
from fuserl_megatron.objectives.logps import sequence_logps  # noqa: E402

PAIRS = [
    {"prompt": "w1 w2 w3", "chosen": " w4 w5 w6 w7", "rejected": " w8 w9"},
    {"prompt": "w11 w2", "chosen": " w14 w5", "rejected": " w8 w9 w10 w12 w13"},
    {"prompt": "w1 w21 w2 w3", "chosen": " w24 w25 w6", "rejected": " w28 w29 w7"},
]
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *[f"w{i}" for i in range(40)]])}
BETA = 0.3


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def tiny_model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,  # far from uniform, so that log-ratios are not tiny
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def arguments(folder, **settings):
    common = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    return {"output_dir": str(folder), "per_device_train_batch_size": len(PAIRS), **common, **settings}


def response_sums(model, input_ids_BS, attention_mask_BS, scored_BS):
    """Sum of log-probabilities of the scored tokens of each row, and how many there are. scored_BS marks targets."""
    logits_BSV = model(input_ids=input_ids_BS, attention_mask=attention_mask_BS).logits[:, :-1]
    token_logps_BS = logits_BSV.log_softmax(-1).gather(-1, input_ids_BS[:, 1:, None]).squeeze(-1)
    scored_BS = scored_BS[:, 1:].bool()
    rows_T = scored_BS.nonzero()[:, 0]
    rows = input_ids_BS.shape[0]
    return sequence_logps(token_logps_BS[scored_BS], rows_T, rows), rows_T.bincount(minlength=rows)


def assert_same(trl_loss, trl_model, loss, model):
    """Loss and the gradient of every parameter agree to 1e-5."""
    trl_loss.backward()
    loss.backward()
    assert loss.item() == pytest.approx(trl_loss.item(), rel=1e-5, abs=1e-6)
    expected = {name: p.grad for name, p in trl_model.named_parameters()}
    largest = max(g.abs().max().item() for g in expected.values())
    assert largest > 1e-3
    for name, parameter in model.named_parameters():
        worst = (parameter.grad - expected[name]).abs().max().item()
        assert worst <= 1e-5 * largest, (name, worst, largest)


def dpo_batch(tmp_path, tokenizer, pairs=PAIRS, **settings):
    """TRL's DPO trainer and batch, and our side's models."""
    model, reference = tiny_model(0), tiny_model(1)
    ours = copy.deepcopy(model)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(reference),
        args=trl.DPOConfig(**arguments(tmp_path, beta=BETA, **settings)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer, batch, ours, reference


def named(pair_loss, lengths=None, **options):
    """A loss over (policy, reference, lengths) halves."""

    def call(policy, reference, halves):
        return pair_loss(policy, reference, *([halves] if lengths else []), **options)

    return call


DPO_CASES = {
    # TRL's `sigmoid` ignores label_smoothing: plain DPO. (TRL 0.9 smoothed it: that is our cdpo.)
    "sigmoid": ({"label_smoothing": 0.1}, named(preference.dpo, beta=BETA)),
    "sigmoid_norm": ({}, named(preference.ln_dpo, lengths=True, beta=BETA)),
    "hinge": ({}, named(preference.hinge, beta=BETA)),
    "robust": ({"label_smoothing": 0.1}, named(preference.robust, beta=BETA, label_smoothing=0.1)),
    "exo_pair": ({"label_smoothing": 0.01}, named(preference.exo, beta=BETA, label_smoothing=0.01)),
    "discopop": ({"discopop_tau": 0.05}, named(preference.discopop, beta=BETA, discopop_tau=0.05)),
    "apo_zero": ({}, named(absolute.apo_zero, beta=BETA)),
    "apo_down": ({}, named(absolute.apo_down, beta=BETA)),
    "nca_pair": ({}, named(absolute.nca, beta=BETA)),
    # TRL leaves BCO's delta out of its pair loss: 0.
    "bco_pair": ({}, named(absolute.bco, beta=BETA, delta=0.0)),
    "sppo_hard": ({}, named(absolute.sppo, beta=BETA)),
    # TRL's `ipo` is the length-normalised one; the summed one of the paper exists only here.
    "ipo": ({}, named(preference.ipo, lengths=True, beta=BETA, length_normalized=True)),
}


@pytest.mark.parametrize("loss_type", DPO_CASES)
def test_dpo_trainer(loss_type, tmp_path, tokenizer):
    settings, our_loss = DPO_CASES[loss_type]
    trainer, batch, ours, reference = dpo_batch(tmp_path, tokenizer, loss_type=loss_type, **settings)
    inputs = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    policy_N, lengths_N = response_sums(ours, *inputs)
    with torch.no_grad():
        reference_N, _ = response_sums(reference, *inputs)
    result = our_loss(policy_N.chunk(2), reference_N.chunk(2), lengths_N.chunk(2))
    assert_same(trainer.compute_loss(trainer.model, batch), trainer.model, result.losses_P.mean(), ours)


def test_mpo_is_trl_s_sum_of_three_losses(tmp_path, tokenizer):
    """On a single pair, where TRL's NLL over all chosen tokens of the batch is that of the response."""
    settings = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.7]}
    trainer, batch, ours, reference = dpo_batch(tmp_path, tokenizer, pairs=PAIRS[1:2], **settings)
    inputs = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    policy_N, lengths_N = response_sums(ours, *inputs)
    with torch.no_grad():
        reference_N, _ = response_sums(reference, *inputs)
    weights = {"preference_weight": 0.8, "bco_weight": 0.2, "delta": 0.0}
    result = absolute.mpo(policy_N.chunk(2), reference_N.chunk(2), beta=BETA, **weights)
    loss = result.losses_P + preference.sft_term(policy_N[:1], lengths_N[:1], rpo_alpha=0.7)
    assert_same(trainer.compute_loss(trainer.model, batch), trainer.model, loss.mean(), ours)


def test_the_comparison_would_notice_the_other_ipo(tmp_path, tokenizer):
    """Negative control: the summed IPO is not TRL's."""
    trainer, batch, ours, reference = dpo_batch(tmp_path, tokenizer, loss_type="ipo")
    inputs = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    policy_N, lengths_N = response_sums(ours, *inputs)
    reference_N, _ = response_sums(reference, *inputs)
    halves = policy_N.chunk(2), reference_N.chunk(2), lengths_N.chunk(2)
    result = preference.ipo(*halves, beta=BETA, length_normalized=False)
    with pytest.raises(AssertionError):
        assert_same(trainer.compute_loss(trainer.model, batch), trainer.model, result.losses_P.mean(), ours)


def concatenated(trainer, batch, padding_value):
    joined = trainer.concatenated_inputs(batch, padding_value=padding_value)
    names = ("concatenated_input_ids", "concatenated_attention_mask", "concatenated_labels")
    input_ids_BS, attention_mask_BS, labels_BS = (joined[name] for name in names)
    return input_ids_BS, attention_mask_BS, labels_BS != -100


CPO_CASES = {
    # SimPO is TRL's CPO trainer with cpo_alpha 0; simpo_gamma is absolute, as our function's gamma.
    "simpo": ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}, PAIRS),
    # TRL averages the NLL over all chosen tokens of the batch, we over each response's own: equal for a single pair.
    "cpo": ({"loss_type": "sigmoid", "cpo_alpha": 0.7}, PAIRS[1:2]),
}


@pytest.mark.parametrize("name", CPO_CASES)
def test_cpo_trainer(name, tmp_path, tokenizer):
    cpo = pytest.importorskip("trl.experimental.cpo", reason="this TRL has no CPO trainer")
    settings, pairs = CPO_CASES[name]
    model = tiny_model(0)
    ours = copy.deepcopy(model)
    trainer = cpo.CPOTrainer(
        model=model,
        args=cpo.CPOConfig(**arguments(tmp_path, beta=BETA, max_length=64, **settings)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    policy_N, lengths_N = response_sums(ours, *concatenated(trainer, batch, trainer.pad_token_id))
    if name == "simpo":
        result = preference.simpo(policy_N.chunk(2), lengths_N.chunk(2), beta=BETA, gamma=0.5)
    else:
        result = preference.cpo(policy_N.chunk(2), lengths_N.chunk(2), beta=BETA, cpo_alpha=0.7)
    trl_loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    assert_same(trl_loss, trainer.model, result.losses_P.mean(), ours)


def test_orpo_trainer(tmp_path, tokenizer):
    """TRL's ORPO also scores the prompt in its NLL; we score the response alone. The rest is the same.

    The difference of the two NLLs is computed here from the same forward pass, on a single pair.
    """
    orpo = pytest.importorskip("trl.experimental.orpo", reason="this TRL has no ORPO trainer")
    model = tiny_model(0)
    ours = copy.deepcopy(model)
    trainer = orpo.ORPOTrainer(
        model=model,
        args=orpo.ORPOConfig(**arguments(tmp_path, beta=BETA, max_length=64)),
        train_dataset=Dataset.from_list(PAIRS[1:2]),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    input_ids_BS, attention_mask_BS, scored_BS = concatenated(trainer, batch, trainer.padding_value)
    policy_N, lengths_N = response_sums(ours, input_ids_BS, attention_mask_BS, scored_BS)
    everything_N, counts_N = response_sums(ours, input_ids_BS, attention_mask_BS, attention_mask_BS)
    result = preference.orpo(policy_N.chunk(2), lengths_N.chunk(2), beta=BETA)
    nll_response, nll_everything = -policy_N[0] / lengths_N[0], -everything_N[0] / counts_N[0]
    assert abs((nll_response - nll_everything).item()) > 1e-3
    trl_loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    assert_same(trl_loss, trainer.model, result.losses_P.mean() - nll_response + nll_everything, ours)


def test_kto_trainer(tmp_path, tokenizer):
    model, reference = tiny_model(1), tiny_model(0)
    ours = copy.deepcopy(model)
    rows = [
        {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
        for p in PAIRS
        for side in ("chosen", "rejected")
    ]
    settings = {"beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    trainer = trl.KTOTrainer(
        model=model,
        ref_model=copy.deepcopy(reference),
        args=trl.KTOConfig(**{**arguments(tmp_path, **settings), "per_device_train_batch_size": len(rows)}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    matched = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    mismatched = (batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])
    policy_N, _ = response_sums(ours, *matched)
    with torch.no_grad():
        reference_N, _ = response_sums(reference, *matched)
        policy_kl_N, _ = response_sums(ours, *mismatched)
        reference_kl_N, _ = response_sums(reference, *mismatched)
    kl = group_losses.kto_kl(policy_kl_N, reference_kl_N)
    assert kl > 0.01  # otherwise the clamp would hide it
    desirable_N = torch.as_tensor(batch["label"], dtype=torch.bool)
    losses_N = group_losses.kto(policy_N, reference_N, desirable_N, kl, **settings)
    assert_same(trainer.compute_loss(trainer.model, batch), trainer.model, losses_N.mean(), ours)
