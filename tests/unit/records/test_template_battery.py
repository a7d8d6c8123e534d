"""Every kind of chat template against every kind of conversation: the prompt is transformers' own, the scored text is
what follows it in the full rendering, up to the token that generation stops at; what is refused is listed here.

The templates (tests/assets/templates, families.json says which marks each has) imitate the structures of the families
whose names they carry. They run on a byte-level BPE and on a SentencePiece-like one (a space in front of every text,
bytes for what the vocabulary lacks).
"""

import json
import logging
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fuserl_megatron.records.messages import BadRecord, as_dicts
from fuserl_megatron.records.templates import BadPrompt
from fuserl_megatron.records.tokenize import ChatTokenizer

ASSETS = Path(__file__).parents[2] / "assets" / "templates"
FAMILIES = json.loads((ASSETS / "families.json").read_text(encoding="utf-8"))
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
CALL = [{"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": "1"}}}]
USER = (("user", "What is 2+2?"),)
THOUGHT = "<think>\ntwo and two\n</think>\n\n4"
CONVERSATIONS = {
    "plain": (USER, "It is 4."),
    "system": ((("system", "Answer in French."), *USER), "Quatre."),
    "turns": ((("user", "Hi"), ("assistant", "Hello!"), ("user", "2+2?")), "4, of course"),
    "spaces": ((("user", "  Hi there  "),), "  It is 4.  "),
    "leading newline": (USER, "\nIt is 4."),
    "trailing newline": (USER, "It is 4.\n\n"),
    "unicode": ((("user", "\U0001f468\u200d\U0001f469 \u00fc\u4e16"),), "\u4e16\u754c e\u0301 \U0001f44b\U0001f3fd"),
    "code": ((("user", "code?"),), "```python\ndef f(x):\n\treturn {'a': [x]}  # 100 %\n```"),
    "echo": ((("user", "Say hi"),), "Say hi"),
    "jinja": ((("user", "{{ messages }} {% if x %}"),), "{% for m in y %}{{ m }}{# c #}"),
    "mark inside": (USER, "It is MARK 4."),
    "mark in prompt": ((("user", "ab MARK cd"),), "It is 4."),
    "only a mark": (USER, "MARK"),
    "thought": (USER, THOUGHT),
    "innocent": (USER, "Write </think> to close a thought."),
    "tools": (USER, "It is 4.", [TOOL]),
    "tool call": (
        (*USER, ("assistant", None, json.dumps({"tool_calls": CALL})), ("tool", "4", '{"tool_call_id": "call00001"}')),
        "It is 4.",
    ),
}  # fmt: skip

WITH_TOOLS = {"llama31_tools", "mistral_v3", "qwen25", "qwen3", "glm45", "kimi_k2", "granite3", "gpt_oss"}
WITH_CALLS = WITH_TOOLS - {"granite3"}
NO_SYSTEM = {"mistral_v1", "gemma2"}
NO_THINKING = {"qwen3 no thinking", "qwen35 no thinking", "glm45 no thinking"}
OPEN = {"qwen3_thinking", "qwen35", "deepseek_r1", "deepseek_v31 thinking", "nemotron_nano"}


def expected_refusal(family, case):
    """The kind of refusal that is fair: the template itself refuses or drops something, or the thought is missing."""
    file = FAMILIES[family].get("file", family)
    if case == "tools" and file not in WITH_TOOLS:
        return "tools_not_rendered"
    if case == "tool call" and file not in WITH_CALLS:
        return {"template_error", "tool_calls_not_rendered", "tool_message_not_rendered"}
    if case == "thought" and family in NO_THINKING:
        return "reasoning_not_expected"  # the prompt closes the thought
    if case == "system" and file in NO_SYSTEM:
        return "template_error"  # its own raise_exception
    if family in {"deepseek_r1", "deepseek_v31 thinking", "nemotron_nano"} and case not in ("thought", "innocent"):
        return "reasoning_missing"  # the prompt opens a thought; these renderings have none
    return None


def byte_level(marks, rstrip):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("i", "n"), ("\u010a", "\u010a"), ("I", "t")]
    backend = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(alphabet + [a + b for a, b in merges])}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return add_marks(backend, marks, rstrip)  # fmt: skip


def sentence_piece(marks, rstrip):
    """Llama 2's construction: every piece of text between marks gets a space in front, unknown characters are bytes."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *map(chr, range(33, 127)), "It", "\u2581It"]
    merges = [("I", "t"), ("\u2581", "It")]
    backend = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return add_marks(backend, marks, rstrip)


def add_marks(backend, marks, rstrip):
    backend.add_special_tokens([AddedToken(m, special=True, normalized=False, rstrip=rstrip) for m in marks])
    return backend


def open_tokenizer(make, directory, family):
    from transformers import PreTrainedTokenizerFast

    logging.getLogger("transformers").setLevel(logging.ERROR)
    about = FAMILIES[family]
    template = ASSETS / f"{about.get('file', family)}.jinja"
    backend = make(about["special"].split(), about.get("rstrip", False))
    names = {f"{n}_token": about[n] for n in ("bos", "eos") if n in about}
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    saved.chat_template = template.read_text(encoding="utf-8")
    saved.save_pretrained(directory)
    if "stops" in about:
        stops = saved.convert_tokens_to_ids(about["stops"].split())
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return ChatTokenizer(str(directory), chat_template_kwargs=about.get("kwargs"))


def decode(tokenizer, tokens):
    return tokenizer.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check(tokenizer, family, case):
    about = FAMILIES[family]
    messages, response, *tools = CONVERSATIONS[case]
    mark = about["eos"]
    messages = tuple((m[0], m[1] and m[1].replace("MARK", mark), *m[2:]) for m in messages)
    response = response.replace("MARK", mark)
    settings = {"tools": tools[0] if tools else None, **about.get("kwargs", {})}
    apply = tokenizer.tokenizer.apply_chat_template
    expected = expected_refusal(family, case)
    try:
        prompt = tokenizer.encode_prompt(messages, json.dumps(tools[0]) if tools else "")
        (result,) = tokenizer.encode_responses(prompt, [(response, ("in.jsonl", 1))])
        if isinstance(result, BadRecord):
            raise BadPrompt(result.kind, str(result))
    except BadPrompt as refusal:
        assert expected is not None and refusal.kind in expected, f"{family}, {case}: refused, {refusal}"
        return
    assert expected is None, f"{family}, {case}: not refused"

    chat = as_dicts(messages)
    asked = apply(chat, tokenize=False, add_generation_prompt=True, **settings)
    assert prompt.text == asked
    assert prompt.tokens == apply(chat, add_generation_prompt=True, return_dict=False, **settings)
    stops = {tokenizer.tokenizer.convert_tokens_to_ids(t) for t in about.get("stops", about.get("end", mark)).split()}
    assert result.tokens[-1] in stops and not result.truncated
    if about.get("appended"):  # nothing closes a turn in the rendering
        assert result.tokens[-1] == tokenizer.tokenizer.eos_token_id

    full = apply([*chat, {"role": "assistant", "content": response}], tokenize=False, **settings)
    text, change = tokenizer._renderer.scored(prompt.rendered, response)
    stop = "" if about.get("appended") else tokenizer.tokenizer.convert_ids_to_tokens(result.tokens[-1])
    if full.startswith(asked):
        assert full.startswith(asked + text + stop), (
            f"{family}, {case}: {full!r} does not begin with prompt and {text!r}"
        )
        if not about.get("appended"):  # and nothing that the model could still write comes behind
            assert not full[len(asked + text + stop) :].strip("\n") or family in ("phi4_mini", "phi3")
    elif text + stop not in full:  # the rendering cannot hold it: the response as it was given, behind the prompt
        assert response.endswith(text.removesuffix(prompt.rendered.closing)), f"{family}, {case}: {text!r} in {full!r}"
    if change is None and text.startswith(prompt.rendered.lead):
        inner = text.removeprefix(prompt.rendered.lead).removesuffix(prompt.rendered.closing)
        assert inner == response or text == response or response.endswith(inner) and family in OPEN
    # the tokens are those of that text, behind the prompt's
    ids = tokenizer._ids(text)
    if tokenizer._dummy_prefix:
        joint = tokenizer._ids(prompt.text + text)
        if joint[: len(prompt.tokens)] == prompt.tokens and len(joint) > len(prompt.tokens):
            ids = joint[len(prompt.tokens) :]
    elif not about.get("rstrip"):  # such marks swallow white space
        assert decode(tokenizer, result.tokens[:-1]) == text
    assert result.tokens[:-1] == ids


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_and_the_scored_text_are_those_of_inference(make, family, tmp_path):
    tokenizer = open_tokenizer(make, tmp_path, family)
    for case in CONVERSATIONS:
        check(tokenizer, family, case)
