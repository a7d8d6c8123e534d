"""Stop tokens, what is cut off, tools, what a template changes, text parts: one small template each."""

import json

import pytest

from fuserl_megatron.records.messages import BadRecord
from fuserl_megatron.records.summary import summary_lines
from fuserl_megatron.records.templates import BadPrompt
from fuserl_megatron.records.tokenize import ChatTokenizer
from fuserl_megatron.util.errors import UserError

USER = (("user", "Hi"),)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ BODY }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPEN{% endif %}"
)
CUT = CHATML.replace("BODY", "m.content.split('</think>')[-1]").replace("OPEN", "")
TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    "{{ '#' ~ m.tool_call_id ~ m.name if m.role == 'tool' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLS = [{"function": {"name": "add", "arguments": {"b": 1, "a": 2}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": CALLS}
ANSWER = {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}
ASKED = [{"role": "user", "content": "1+2?"}, CALL, ANSWER]


@pytest.fixture
def open_template(tokenizers_dir, tmp_path):
    def run(text, name="chatml", **settings):
        (tmp_path / "t.jinja").write_text(text, encoding="utf-8")
        return ChatTokenizer(tokenizers_dir[name], str(tmp_path / "t.jinja"), **settings)

    return run


def scored(tokenizer, response, messages=USER, tools=""):
    """(prompt, scored text with its stop token, what the template did), or the kind of refusal."""
    try:
        prompt = tokenizer.encode_prompt(messages, tools)
    except BadPrompt as error:
        return error.kind
    (result,) = tokenizer.encode_responses(prompt, [(response, ("in.jsonl", 1))])
    if isinstance(result, BadRecord):
        return result.kind
    text = tokenizer.tokenizer.decode(result.tokens, clean_up_tokenization_spaces=False)
    return prompt.text, text, result.change


def with_marks(tokenizers_dir, tmp_path, template, marks, stops=(), **names):
    """A byte-level tokenizer with further marks; `stops` are named in generation_config.json."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers_dir["chatml"])
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.add_special_tokens(names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "marks")
    ids = tokenizer.convert_tokens_to_ids(list(stops))
    (tmp_path / "marks" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids or None}))
    return str(tmp_path / "marks")


def test_a_system_text_that_only_the_last_turn_has_is_in_the_prompt(open_template):
    tokenizer = open_template(
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }} {% endif %}{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    chat = (("system", "Answer in French."), ("user", "Hi"))
    assert scored(tokenizer, "Bonjour", chat) == ("[INST]Answer in French. Hi[/INST]", "Bonjour<|im_end|>", None)


TWO_MARKS = (
    "{% for m in messages %}<turn>{{ m.role }}<say>{{ m.content }}{{ '</say>' if m.role == 'assistant' }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant<say>{% endif %}"
)
MARKS = ["<turn>", "<say>", "</say>", "</turn>"]


def test_a_turn_is_closed_by_the_token_that_generation_stops_at(tokenizers_dir, tmp_path):
    path = with_marks(tokenizers_dir, tmp_path, TWO_MARKS, MARKS, eos_token="</turn>")
    assert scored(ChatTokenizer(path), "a")[1] == "a</say></turn>"
    # eos is not printed, but generation_config names the mark that is
    path = with_marks(tokenizers_dir, tmp_path, TWO_MARKS, MARKS, stops=["</turn>"], eos_token="<|im_end|>")
    tokenizer = ChatTokenizer(path)
    assert scored(tokenizer, "a")[1] == "a</say></turn>"
    assert set(tokenizer.stop_tokens) == {"<|im_end|>", "</turn>"} and tokenizer.end_of_turn == "</turn>"
    # neither: the first special token
    path = with_marks(tokenizers_dir, tmp_path, TWO_MARKS, MARKS, eos_token="<|im_end|>")
    assert scored(ChatTokenizer(path), "a")[1] == "a</say>"


def test_the_next_turns_header_is_never_taught(tokenizers_dir, tmp_path):
    text = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>"
    marks = ["<|user|>", "<|assistant|>"]
    path = with_marks(tokenizers_dir, tmp_path, text, marks, eos_token="<|im_end|>")
    assert scored(ChatTokenizer(path), "a") == ("<|user|>\nHi<|assistant|>", "\na<|im_end|>", None)
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"  # nor one of plain text
    path = with_marks(tokenizers_dir, tmp_path, text, marks, eos_token="<|im_end|>")
    assert scored(ChatTokenizer(path), "a") == ("user: Hi\nassistant:", " a<|im_end|>", None)
    # a mark that closes every message is no header, though the prompt ends with it
    text = "{% for m in messages %}{{ m.content }}<|user|>{% endfor %}"
    path = with_marks(tokenizers_dir, tmp_path, text, marks, eos_token="<|im_end|>")
    assert scored(ChatTokenizer(path), "a") == ("Hi<|user|>", "a<|user|>", None)


def test_an_unreadable_generation_config_is_one_line(tokenizers_dir, tmp_path):
    path = with_marks(tokenizers_dir, tmp_path, TWO_MARKS, MARKS)
    for text in ("{", "[]", '{"eos_token_id": ' + "[" * 9999):
        (tmp_path / "marks" / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match="generation_config.json cannot be read") as error:
            ChatTokenizer(path)
        assert "\n" not in str(error.value)
    (tmp_path / "marks" / "generation_config.json").write_text('{"eos_token_id": ["x", true, 99999999, null]}')
    assert set(ChatTokenizer(path).stop_tokens) == {"<|im_end|>"}


def test_an_open_block_of_reasoning_asks_for_the_reasoning(open_template):
    tokenizer = open_template(CUT.replace("assistant\n{%", "assistant\n<think>\n{%"))
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    for response in ("<think>\nhm\n</think>\n\n4", "hm\n</think>\n\n4", " <think>\nhm\n</think>\n\n4"):
        assert scored(tokenizer, response) == (prompt, "hm\n</think>\n\n4<|im_end|>", None)
    assert scored(tokenizer, "<think>hm</think>4")[1] == "hm</think>4<|im_end|>"
    assert scored(tokenizer, "4") == "reasoning_missing"


def test_a_closed_block_of_reasoning_is_followed_by_the_answer(open_template):
    for block in ("<think></think>", "<think>\n\n</think>\n\n", "</think>"):
        tokenizer = open_template(CUT.replace("assistant\n{%", "assistant\n" + block + "{%"))
        assert scored(tokenizer, "4")[1:] == ("4<|im_end|>", None)


def test_what_a_template_changes_is_named(open_template, build_dataset, make_record, tokenizers_dir, tmp_path):
    tokenizer = open_template(CUT)
    assert scored(tokenizer, "<think>hm</think>\n\n4")[1:] == ("\n\n4<|im_end|>", "cut")
    assert scored(tokenizer, "<think>hm</think>") == "response_without_tokens"
    trimmed = open_template(CHATML.replace("BODY", "m.content | trim").replace("OPEN", ""))
    assert scored(trimmed, " 4\n")[1:] == ("4<|im_end|>", "stripped") and scored(trimmed, "4")[2] is None
    wrapped = open_template(
        CHATML.replace(
            "BODY",
            "'<think>\n\n</think>\n\n' ~ m.content if m.role == 'assistant' and '<think>' not in "
            "m.content else m.content.replace('\n', '\n\n')",
        ).replace("OPEN", "")  # fmt: skip
    )
    assert scored(wrapped, "4")[1:] == ("<think>\n\n</think>\n\n4<|im_end|>", None)
    assert scored(wrapped, "<think>\nhm</think>4")[1:] == ("<think>\n\nhm</think>4<|im_end|>", "rewrapped")

    (tmp_path / "t.jinja").write_text("{{ strftime_now('%Y') }}" + CUT.replace("[-1]", "[-1].strip()"))
    data = build_dataset(
        [
            make_record(prompt="p", response=" 4 "),
            make_record(prompt="p<|im_end|>", response="<think>hm</think>5"),
            make_record(prompt="p", response="6"),
        ],
        tokenizer=tokenizers_dir["chatml"],
        chat_template=str(tmp_path / "t.jinja"),
    )
    counts = data.manifest.counts
    assert (counts["responses_stripped_by_template"], counts["responses_cut_by_template"]) == (1, 1)
    assert counts["responses_rewrapped_by_template"] == counts["responses_with_special_tokens"] == 0
    assert counts["prompts_with_special_tokens"] == 1 and counts["prompts_with_the_date"] == 2
    printed = "\n".join(summary_lines(data.manifest))
    assert "responses_cut_by_template 1" in printed and "the chat template prints the date" in printed


def test_the_templates_own_marks_are_no_alarm(tokenizers_dir, tmp_path):
    text = CHATML.replace("BODY", "'<think>\n\n</think>\n\n<say>' * (m.role == 'assistant') ~ m.content")
    path = with_marks(tokenizers_dir, tmp_path, text.replace("OPEN", ""), ["<think>", "</think>", "<say>"])
    tokenizer = ChatTokenizer(path)
    prompt = tokenizer.encode_prompt(USER)
    results = tokenizer.encode_responses(prompt, [(r, ("f", 1)) for r in ("4", "<think>x</think>4", "<say>4")])
    assert [r.special_in_text for r in results] == [False, False, True]


def test_tools_and_calls_are_printed_in_their_order_and_make_groups(
    build_dataset, make_record, tokenizers_dir, tmp_path, open_template
):
    tokenizer = open_template(TOOLS)
    chat = (("user", "1+2?"), ("assistant", None, json.dumps({"tool_calls": CALLS})),
            ("tool", "3", '{"tool_call_id": "c1", "name": "add"}'))  # fmt: skip
    apply = tokenizer.tokenizer.apply_chat_template
    expected = apply(ASKED, tools=[TOOL], chat_template=TOOLS, tokenize=False, add_generation_prompt=True)
    assert scored(tokenizer, "3", chat, json.dumps([TOOL])) == (expected, "3<|im_end|>", None)
    assert '"b": 1, "a": 2' in expected and "3#c1add" in expected

    records = [
        make_record(prompt=ASKED, tools=[TOOL]),
        make_record(prompt=ASKED, tools=json.dumps([TOOL]), source="b"),
        make_record(prompt=ASKED, tools=[]),
        make_record(prompt=ASKED, tools=None, source="b"),
        make_record(prompt=[*ASKED[:2], {**ANSWER, "tool_call_id": "c2"}]),
    ]
    settings = {"tokenizer": tokenizers_dir["chatml"], "chat_template": str(tmp_path / "t.jinja")}
    data = build_dataset(records, **settings)
    assert data.num_groups == 3 and data.manifest.unknown_keys == {}
    assert tokenizer.tokenizer.decode(data.prompt(0), clean_up_tokenization_spaces=False) == expected


def test_tools_that_a_template_drops_are_refused_by_name(build_dataset, make_record, tokenizers_dir, open_template):
    records = [
        make_record(prompt="p", tools=[TOOL]),
        make_record(prompt=ASKED),
        make_record(prompt=[ASKED[0], {"role": "tool", "content": "3"}]),
        make_record(),
    ]
    data = build_dataset(records, tokenizer=tokenizers_dir["chatml"], on_bad_record="skip")
    assert data.manifest.rejected == {"tools_not_rendered": 1, "tool_calls_not_rendered": 1} and data.num_groups == 2
    tokenizer = open_template("{% for m in messages if m.role != 'tool' %}{{ m.content }}<|im_end|>{% endfor %}")
    assert scored(tokenizer, "4", (*USER, ("tool", "3"))) == "tool_message_not_rendered"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"tools": "[{"}, "wrong_type_tools"),
        ({"tools": {"a": 1}}, "wrong_type_tools"),
        ({"tools": ["a"]}, "wrong_type_tools"),
        ({"tools": "[{\"a\": \"\\ud800\"}]"}, "invalid_text_tools"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "not_text_prompt"),
        ({"prompt": [{"role": "user", "content": ["x"]}]}, "not_text_prompt"),
        ({"prompt": [{"role": "user", "content": []}]}, "empty_prompt"),
        ({"prompt": [{"role": "user", "content": None}]}, "wrong_type_prompt"),
        ({"prompt": [{"role": "user", "content": "a", "tool_calls": [{"x": 1}]}]}, "wrong_type_prompt"),
        ({"prompt": [{"role": ["user"], "content": "a"}]}, "wrong_type_prompt"),
    ],
)  # fmt: skip
def test_bad_tools_and_parts_are_refused_by_name(build_dataset, make_record, change, kind):
    with pytest.raises(UserError, match=r"in.jsonl:1: ") as error:
        build_dataset([make_record(**change), make_record()])
    assert "\n" not in str(error.value)
    data = build_dataset([make_record(**change), make_record()], on_bad_record="skip")
    assert data.manifest.rejected == {kind: 1}


def test_text_parts_are_put_together(build_dataset, make_record):
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    data = build_dataset([make_record(), make_record(prompt=[{"role": "user", "content": parts}], source="b")])
    assert data.num_groups == 1 and data.prompt(0).tolist() == [3, 4]


def test_one_bad_record_never_ends_a_build(build_dataset, make_record, tokenizers_dir, tmp_path):
    """Every way a template can fail, one prompt each."""
    (tmp_path / "t.jinja").write_text(
        CHATML.replace("BODY", "m.content").replace("OPEN", "")
        + "{% set c = messages[0].content %}{% if c == 'raise' %}{{ raise_exception('\x1b[31mno') }}"
        "{% elif c == 'type' %}{{ c + 1 }}{% elif c == 'zero' %}{{ 1 / 0 }}{% elif c == 'undefined' %}{{ x.y.z }}"
        "{% elif c == 'endless' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        "{% elif c == 'deep' %}{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}{% endif %}"
    )
    kinds = ("raise", "type", "zero", "undefined", "endless", "deep")
    data = build_dataset(
        [make_record(prompt=p) for p in (*kinds, "good")],
        tokenizer=tokenizers_dir["chatml"],
        chat_template=str(tmp_path / "t.jinja"),
        on_bad_record="skip",
    )
    assert data.num_groups == 1 and data.manifest.rejected == {"template_error": 4, "template_limit": 2}
    reasons = [json.loads(x)["reason"] for x in (tmp_path / "fused" / "rejected.jsonl").read_text().splitlines()]
    assert all(reason.isprintable() for reason in reasons) and r"\x1b[31mno" in reasons[0]


def test_arguments_of_the_template_reach_every_rendering(open_template, build_dataset, make_record, tokenizers_dir):
    text = CHATML.replace("BODY", "m.content").replace("OPEN", "{{ '<think></think>' if not enable_thinking }}")
    assert open_template(text, chat_template_kwargs={"enable_thinking": True}).render_probe()
    on, off = (open_template(text, chat_template_kwargs={"enable_thinking": v}) for v in (True, False))
    assert scored(on, "4")[0] + "<think></think>" == scored(off, "4")[0] and scored(off, "4")[1] == "4<|im_end|>"
    assert on.template_kwargs == {"enable_thinking": True} and on.template == off.template
    assert on.render_probe() != off.render_probe() == off.render_probe()
    with pytest.raises(UserError, match="does not read it; did you mean enable_thinking"):
        open_template(text, chat_template_kwargs={"enable_thinkin": True})
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        ChatTokenizer(tokenizers_dir["words"], chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(UserError, match=r"chat_template_kwargs.messages: the data set gives"):
        build_dataset([make_record()], chat_template_kwargs={"messages": []})


def test_the_probe_tells_tokenizers_and_templates_apart_and_not_their_spelling(tokenizers_dir, open_template):
    chatml = ChatTokenizer(tokenizers_dir["chatml"])
    same = open_template("{#- a comment -#}" + CHATML.replace("BODY", "m['content']").replace("OPEN", ""))
    assert same.template_hash != chatml.template_hash and same.render_probe() == chatml.render_probe()
    probes = [ChatTokenizer(tokenizers_dir[n]).render_probe() for n in ("chatml", "llama3", "unmarked", "words")]
    assert all(probe and probes.count(probe) == 1 for probe in probes)
    dated = "{{ strftime_now('%Y %f') }}" + CUT
    assert open_template(dated).render_probe() == open_template(dated).render_probe()


def test_a_build_with_arguments(build_dataset, make_record, tokenizers_dir, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ style }}" + CHATML.replace("BODY", "m.content").replace("OPEN", ""))
    settings = {"tokenizer": tokenizers_dir["chatml"], "chat_template": str(tmp_path / "t.jinja"), "force": True}
    length = build_dataset([make_record()], **settings).prompt_lengths[0]
    styled = build_dataset([make_record()], chat_template_kwargs={"style": "in"}, **settings)
    assert styled.prompt_lengths[0] == length + 1
