"""Tiny models and tokenizers in Hugging Face's format, made on the spot."""

from pathlib import Path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ENDS_BARE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
)
"""A template whose text ends in the end-of-turn token itself, without a line end behind it."""

LLAMA = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def save_tiny_model(directory: str | Path, *, seed: int = 0, family: str = "llama", scale: float = 4.0, **overrides):
    """Write a random model of a few thousand parameters with transformers, fp32 safetensors.

    Args:
        directory: where to write.
        seed: of the weights; norms are made non-trivial too.
        family: transformers' model type: llama, mistral, qwen2, qwen3.
        scale: factor on the initial weights, so that log-probabilities are far from uniform.
        **overrides: fields of the config.

    Returns:
        The transformers model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(LLAMA, **overrides)
    if "rope_parameters" not in fields and family == "llama":
        fields["rope_parameters"] = LLAMA3_ROPE
    config = AutoConfig.for_model(family, **fields, bos_token_id=None, eos_token_id=1, pad_token_id=None)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "bias" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
            else:
                parameter.mul_(scale)
    model.save_pretrained(directory)
    return model


def save_char_tokenizer(directory: str | Path, *, chat_template: str | None = CHATML):
    """Write a tokenizer with one token a printable ASCII character, <|im_end|> (id 1) as end of turn and as padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>", "<unk>"]
    vocabulary = {t: i for i, t in enumerate(special + ["\n"] + [chr(c) for c in range(32, 127)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_tiny_reward_model(
    directory: str | Path,
    *,
    seed: int = 0,
    num_labels: int = 1,
    scale: float = 4.0,
    edit=None,
    template=ENDS_BARE,
    **fields,
):
    """Write a random LlamaForSequenceClassification and a tokenizer whose padding is the end of turn.

    Args:
        directory: where to write.
        seed: of the weights.
        num_labels: a reward model has 1.
        scale: factor on the initial weights, so that rewards differ.
        edit: called with the model before it is saved.
        template: chat template of the tokenizer; the default one ends in the padding token.
        **fields: of the config.

    Returns:
        The transformers model.
    """
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    save_char_tokenizer(directory, chat_template=template)
    torch.manual_seed(seed)
    config = LlamaConfig(
        **LLAMA | {"num_hidden_layers": 2, "num_labels": num_labels} | fields,
        pad_token_id=1,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(scale if weights.dim() > 1 else 1)
        if edit:
            edit(model)
    model.save_pretrained(directory)
    return model.eval()
