"""Answers of models in this process, side by side: a first look at a trained model. For many prompts there is
`fuserl sample`."""

from collections.abc import Iterator, Sequence
from typing import Any

from fuserl_megatron.records.messages import Messages
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.hub import model_directory
from fuserl_megatron.util.text import first_line


class Generator:
    """One model with its tokenizer, on a GPU where there is one.

    Raises:
        UserError: it cannot be opened, or has no chat template.
    """

    def __init__(self, path: str, dtype: str = "auto"):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        directory = model_directory(path)
        self.name, self.device = path, "cuda" if torch.cuda.is_available() else "cpu"
        kind: Any = dtype if dtype == "auto" else getattr(torch, dtype)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory)
            model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=kind)
            self.model = model.to(self.device).eval()
        except MemoryError:  # no fault of the files
            raise
        except Exception as error:  # transformers raises many kinds
            raise UserError(f"{path}: cannot be opened as a causal language model ({first_line(error)})") from None
        if not self.tokenizer.chat_template:
            raise UserError(f"{path}: its tokenizer has no chat template; `fuserl sample` can ask base models")

    def answers(
        self, messages: Sequence[dict[str, Any]], count: int, max_new_tokens: int, temperature: float, seed: int
    ) -> list[tuple[str, bool]]:
        """(text, whether it was cut by max_new_tokens) of each answer; temperature 0 is greedy, one answer."""
        import torch

        rendered: Any = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = rendered.to(self.device)
        torch.manual_seed(seed)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        with torch.inference_mode():
            found = self.model.generate(
                **ids,
                max_new_tokens=max_new_tokens,
                num_return_sequences=count,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                **sampling,
            )
        new = found[:, ids["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [ends])
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(text, not stops & set(row)) for text, row in zip(texts, new.tolist(), strict=True)]


def as_messages(prompt: Messages) -> list[dict[str, Any]]:
    """A checked prompt as a chat template takes it."""
    return [{"role": part[0], "content": part[1]} for part in prompt]


def side_by_side(
    models: Sequence[str],
    prompts: Sequence[Sequence[dict[str, Any]]],
    count: int,
    most: int,
    temperature: float,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """{"prompt", "model", "answers": [{"text", "cut"}]}, prompt by prompt."""
    opened = [Generator(model) for model in models]
    for prompt in prompts:
        for model in opened:
            answers = model.answers(prompt, count, most, temperature, seed)
            found = [{"text": text, "cut": cut} for text, cut in answers]
            yield {"prompt": list(prompt), "model": model.name, "answers": found}
