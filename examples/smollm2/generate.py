"""Batched sampling with a key/value cache that drops finished rows; used by `sample.py` and `evaluate.py`.

Shapes: B prompts, N samples of each, S prompt tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from transformers import DynamicCache


@dataclass(frozen=True)
class Answer:
    """A generated response.

    Attributes:
        text: the response without the end-of-turn token.
        num_tokens: generated tokens, the end-of-turn token included.
        cut_off: the token limit came before the end-of-turn token.
    """

    text: str
    num_tokens: int
    cut_off: bool


def choose(logits_BV: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None):
    """Returns one token id per row: the most likely one at temperature 0, else a draw from the top-p nucleus."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    probabilities_BV, order_BV = (logits_BV.float() / temperature).softmax(-1).sort(-1, descending=True)
    outside_BV = probabilities_BV.cumsum(-1) - probabilities_BV > top_p  # the most likely token always stays
    drawn_B1 = torch.multinomial(probabilities_BV.masked_fill(outside_BV, 0.0), 1, generator=generator)
    return order_BV.gather(-1, drawn_B1)[:, 0]


@torch.inference_mode()
def generate_batch(model, tokenizer, chats, num_samples, max_new_tokens, temperature, top_p, generator):
    """Samples `num_samples` responses for each chat of one batch.

    Every prompt is read once; its cache is then repeated `num_samples` times.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with a chat template.
        chats: B lists of chat messages.
        num_samples: N.
        max_new_tokens: limit per response, in tokens, end-of-turn included.
        temperature: 0 for greedy.
        top_p: nucleus mass.
        generator: source of randomness, or None when greedy.

    Returns:
        B lists of N Answers.
    """
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits = model(
        inputs["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
    ).logits[:, -1]
    cache.batch_repeat_interleave(num_samples)
    logits, mask = logits.repeat_interleave(num_samples, 0), mask.repeat_interleave(num_samples, 0)
    position = positions[:, -1:].repeat_interleave(num_samples, 0)
    alive = torch.arange(len(chats) * num_samples)  # the sample each row of the shrinking batch belongs to
    tokens: list[list[int]] = [[] for _ in alive]
    for step in range(max_new_tokens):
        chosen = choose(logits, temperature, top_p, generator)
        for row, token in zip(alive.tolist(), chosen.tolist(), strict=True):
            tokens[row].append(token)
        keep = (chosen != tokenizer.eos_token_id).nonzero()[:, 0]
        if len(keep) == 0 or step == max_new_tokens - 1:
            break
        if len(keep) < len(alive):
            alive, chosen, mask, position = alive[keep], chosen[keep], mask[keep], position[keep]
            cache.batch_select_indices(keep)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        position = position + 1
        logits = model(chosen[:, None], attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1]
    answers = [_answer(tokenizer, ids) for ids in tokens]
    return [answers[i : i + num_samples] for i in range(0, len(answers), num_samples)]


def _answer(tokenizer, ids: list[int]) -> Answer:
    cut_off = ids[-1] != tokenizer.eos_token_id
    text = tokenizer.decode(ids if cut_off else ids[:-1], skip_special_tokens=True)
    return Answer(text.strip(), len(ids), cut_off)


def generate(
    model, tokenizer, chats, *, num_samples=1, max_new_tokens=40, temperature=0.0, top_p=1.0, batch_size=32, seed=0
):
    """Samples for any number of chats, batched by length; answers come back in the order of `chats`.

    Returns:
        One list of `num_samples` Answers per chat.
    """
    generator = torch.Generator().manual_seed(seed) if temperature > 0 else None
    order = sorted(range(len(chats)), key=lambda i: sum(len(message["content"]) for message in chats[i]))
    results: list = [None] * len(chats)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        found = generate_batch(
            model, tokenizer, [chats[i] for i in batch], num_samples, max_new_tokens, temperature, top_p, generator
        )
        for i, answers in zip(batch, found, strict=True):
            results[i] = answers
    return results
