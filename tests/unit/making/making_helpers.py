"""Tiny reward models and samples."""

import json

NO_NEWLINE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
)
"""A template whose text ends in the end-of-turn token, which is the padding token too."""


def save_reward_model(directory, *, num_labels=1, seed=0, scale=4.0, template=NO_NEWLINE, edit=None):
    """Write a random LlamaForSequenceClassification in whose tokenizer padding is the end of turn."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from fuserl_megatron.testing.tiny import LLAMA, save_char_tokenizer

    save_char_tokenizer(directory, chat_template=template)
    torch.manual_seed(seed)
    fields = LLAMA | {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**fields, num_labels=num_labels, pad_token_id=1, eos_token_id=1, bos_token_id=None)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(scale if weights.dim() > 1 else 1)
        if edit:
            edit(model)
    model.save_pretrained(directory)
    return model.eval()


def sample(prompt, response, source="a", **fields):
    """A sample as it comes from a file."""
    from fuserl_megatron.making.answers import as_answer

    record = {"prompt": prompt, "source": source, "response": response, **fields}
    return as_answer(("test", 1), record)


def write_records(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)
