"""Training and sampling of the tiny models: plain torch on one process, for making the experiment's data only.

Shapes: B rows, S tokens per row, V vocabulary.
"""

from __future__ import annotations

import time

import models
import skills


def encode_batch(tokenizer, prompts: list[str], answers: list[str]):
    """Right-padded token ids and labels [B, S]; only answer tokens and the end-of-turn token carry labels."""
    import torch

    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        head, tail = tokenizer.encode(models.render(prompt)), tokenizer.encode(answer) + [tokenizer.end_id]
        rows.append((head + tail, [-100] * len(head) + tail))
    width = max(len(ids) for ids, _ in rows)
    ids_BS = torch.tensor([ids + [tokenizer.pad_id] * (width - len(ids)) for ids, _ in rows])
    labels_BS = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    return ids_BS, labels_BS


def mean_nll(model, ids_BS, labels_BS):
    """Mean negative log-likelihood of the labelled tokens. Padding is on the right, so causality hides it."""
    import torch.nn.functional as F

    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten(), ignore_index=-100)


def accuracies(model, tokenizer, tasks: list[skills.Task]) -> dict[str, float]:
    """Greedy exact-match accuracy per skill, teacher-forced: all answer tokens are the argmax given the right ones."""
    import torch

    marks: dict[str, list[float]] = {skill: [] for skill in skills.SKILLS}
    ids_BS, labels_BS = encode_batch(tokenizer, [t.prompt for t in tasks], [t.answer for t in tasks])
    with torch.inference_mode():
        guess_BS = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].argmax(-1)
    right_B = ((guess_BS == labels_BS[:, 1:]) | (labels_BS[:, 1:] == -100)).all(-1)
    for task, right in zip(tasks, right_B.tolist(), strict=True):
        marks[task.skill].append(float(right))
    return {skill: sum(values) / len(values) for skill, values in marks.items()}


def train(model, tokenizer, draw, num_steps: int, peak_lr: float, probe: list[skills.Task], name: str) -> None:
    """AdamW on fresh batches from `draw() -> (prompts, answers)`, warm-up then cosine; prints accuracies on `probe`."""
    import math

    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.time()
    for step in range(num_steps):
        lr = peak_lr * min((step + 1) / 50, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = mean_nll(model, *encode_batch(tokenizer, *draw()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            scores = " ".join(f"{s} {100 * a:3.0f}" for s, a in accuracies(model, tokenizer, probe).items())
            seconds = time.time() - started
            print(
                f"{name} | step {step + 1:5d}/{num_steps} | loss {loss.item():.3f} | {scores} | {seconds:.0f} s",
                flush=True,
            )


def sample(model, tokenizer, prompts: list[str], temperature: float, max_new_tokens: int = 8) -> list[str]:
    """One response per prompt; temperature 0 is greedy. Prompts of one length go together: no padding anywhere."""
    import torch

    rows_by_length: dict[int, list[int]] = {}
    encoded = [tokenizer.encode(models.render(prompt)) for prompt in prompts]
    for i, ids in enumerate(encoded):
        rows_by_length.setdefault(len(ids), []).append(i)
    responses = [""] * len(prompts)
    for _, rows in sorted(rows_by_length.items()):
        ids_BS = torch.tensor([encoded[i] for i in rows])
        with torch.inference_mode():
            new_BS = model.generate(
                input_ids=ids_BS,
                attention_mask=torch.ones_like(ids_BS),
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
            )[:, ids_BS.shape[1] :]
        for i, ids in zip(rows, new_BS.tolist(), strict=True):
            responses[i] = tokenizer.decode(ids)
    return responses
