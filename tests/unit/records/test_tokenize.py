"""What is scored, exactly, under different chat templates; truncation; nothing depends on token ids."""

import pytest

from fuserl_megatron.records.records import BadRecord
from fuserl_megatron.records.tokenize import BadPrompt, ChatTokenizer
from fuserl_megatron.util.errors import UserError

PLACE = ("in.jsonl", 1)
CHAT = (("system", "be kind"), ("user", "the thing"))


def encode(tokenizer, messages, *responses):
    prompt = tokenizer.encode_prompt(messages)
    return prompt, tokenizer.encode_responses(prompt, [(r, PLACE) for r in responses])


def decode(tokenizer, tokens):
    return tokenizer.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("name", "prompt_text", "scored_text", "cut_from_rendering"),
    [
        (
            "chatml",
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nthe thing<|im_end|>\n<|im_start|>assistant\n",
            "the hill  in\n\nhell<|im_end|>",
            "\n",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nthe thing<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "the hill  in\n\nhell<|eot_id|>",
            "",
        ),
        # no generation prompt: the model has to write the header; the closing newline is not scored, the eos token is
        ("unmarked", "System: be kind\nUser: the thing\n", "Assistant: the hill  in\n\nhell</s>", None),
    ],
)
def test_prompt_and_scored_tokens(tokenizers_dir, name, prompt_text, scored_text, cut_from_rendering):
    tokenizer = ChatTokenizer(tokenizers_dir[name])
    response = "the hill  in\n\nhell"
    prompt, (result,) = encode(tokenizer, CHAT, response)
    assert prompt.text == prompt_text and decode(tokenizer, prompt.tokens) == prompt_text
    assert decode(tokenizer, result.tokens) == scored_text and not result.truncated
    if cut_from_rendering is not None:  # together they are the template's own rendering up to the end of the turn
        full = tokenizer.tokenizer.apply_chat_template(
            [{"role": r, "content": c} for r, c in (*CHAT, ("assistant", response))], tokenize=False
        )
        assert prompt_text + scored_text + cut_from_rendering == full
        expected = tokenizer._ids(full.removesuffix(cut_from_rendering) if cut_from_rendering else full)
        assert prompt.tokens + result.tokens == expected


def test_generation_prompt_is_what_transformers_would_generate_from(tokenizers_dir):
    tokenizer = ChatTokenizer(tokenizers_dir["llama3"])
    prompt, _ = encode(tokenizer, CHAT)
    ids = tokenizer.tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in CHAT], add_generation_prompt=True, return_dict=False
    )
    assert prompt.tokens == ids


def test_pad_equal_to_eos_does_not_hide_the_end_of_turn(tokenizers_dir):
    tokenizer = ChatTokenizer(tokenizers_dir["chatml"])
    assert tokenizer.tokenizer.pad_token_id == tokenizer.tokenizer.eos_token_id
    _, (result,) = encode(tokenizer, CHAT, "in")
    assert result.tokens[-1] == tokenizer.tokenizer.eos_token_id and len(result.tokens) == 2
    assert tokenizer.end_of_turn == "<|im_end|>"


def test_the_template_decides_about_white_space(tokenizers_dir):
    _, (trimmed,) = encode(ChatTokenizer(tokenizers_dir["llama3"]), CHAT, "\n in ")
    assert decode(ChatTokenizer(tokenizers_dir["llama3"]), trimmed.tokens) == "in<|eot_id|>"
    _, (kept,) = encode(ChatTokenizer(tokenizers_dir["chatml"]), CHAT, "\n in ")
    assert decode(ChatTokenizer(tokenizers_dir["chatml"]), kept.tokens) == "\n in <|im_end|>"


def test_a_response_never_changes_the_prompt_tokens(tokenizers_dir):
    """'\\n' + '\\n' is one token of this vocabulary; the boundary must keep it apart, as at inference."""
    tokenizer = ChatTokenizer(tokenizers_dir["chatml"])
    prompt, (result,) = encode(tokenizer, CHAT, "\nin")
    joint = tokenizer._ids(prompt.text + "\nin")
    assert joint[: len(prompt.tokens)] != prompt.tokens  # the trap is real
    assert decode(tokenizer, prompt.tokens) == prompt.text and decode(tokenizer, result.tokens) == "\nin<|im_end|>"


def test_a_dummy_prefix_appears_only_where_the_text_has_it(tokenizers_dir, tmp_path):
    tokenizer = ChatTokenizer(tokenizers_dir["metaspace"])
    prompt, (result,) = encode(tokenizer, (("user", "the thing"),), "a hill")
    to_pieces = tokenizer.tokenizer.convert_ids_to_tokens
    assert prompt.text == "<s>[INST] the thing [/INST]"
    assert to_pieces(prompt.tokens + result.tokens) == to_pieces(tokenizer._ids(prompt.text + " a hill </s>"))
    assert to_pieces(result.tokens)[:2] == ["\u2581", "a"] and to_pieces(result.tokens)[-1] == "</s>"
    (tmp_path / "t.jinja").write_text(tokenizer.template.replace("{% else %} ", "{% else %}"))
    tokenizer = ChatTokenizer(tokenizers_dir["metaspace"], str(tmp_path / "t.jinja"))
    _, (result,) = encode(tokenizer, (("user", "the thing"),), "a hill")
    assert to_pieces(result.tokens)[0] == "a"
    assert to_pieces(tokenizer._ids("a hill"))[:2] == ["\u2581", "a"]  # tokenised alone it would get a space


def test_what_the_template_prints_after_its_generation_prompt_is_scored(tokenizers_dir, tmp_path):
    body = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    (tmp_path / "t.jinja").write_text(body + "{% if add_generation_prompt %}assistant:{% endif %}")
    tokenizer = ChatTokenizer(tokenizers_dir["unmarked"], str(tmp_path / "t.jinja"))
    prompt, (result,) = encode(tokenizer, (("user", "in"),), "the hill")
    assert prompt.text == "user: in</s>assistant:" and decode(tokenizer, result.tokens) == " the hill</s>"
    assert prompt.tokens + result.tokens == tokenizer._ids("user: in</s>assistant: the hill</s>")

    (tmp_path / "t.jinja").write_text(body + "{% if add_generation_prompt %}assistant: <mood>{% endif %}")
    with pytest.raises(UserError, match="is not how it prints an answer"):
        ChatTokenizer(tokenizers_dir["unmarked"], str(tmp_path / "t.jinja"))


def test_without_a_template_prompt_response_eos(tokenizers_dir):
    tokenizer = ChatTokenizer(tokenizers_dir["words"])
    prompt, (result,) = encode(tokenizer, (("user", "w1 w2"),), "w3 w4")
    assert (prompt.tokens, result.tokens) == ([3, 4], [5, 6, 1]) and tokenizer.template_hash is None
    with pytest.raises(BadPrompt, match="set chat_template"):
        tokenizer.encode_prompt(CHAT)


def test_without_a_template_a_bos_token_is_kept_and_an_eos_token_is_not_doubled(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    prompt, (result,) = encode(ChatTokenizer(str(tmp_path)), (("user", "a b"),), "b")
    assert (prompt.tokens, result.tokens) == ([1, 3, 4], [4, 2])


def test_truncation_cuts_on_the_right_and_loses_the_end_of_turn(tokenizers_dir):
    tokenizer = ChatTokenizer(tokenizers_dir["words"], max_length=5)
    _, results = encode(tokenizer, (("user", "w1 w2"),), "w3 w4", "w3 w4 w5", "w3 w4 w5 w6")
    assert [(r.tokens, r.truncated) for r in results] == [([5, 6, 1], False), ([5, 6, 7], True), ([5, 6, 7], True)]


def test_a_prompt_without_room_for_a_response(tokenizers_dir):
    tokenizer = ChatTokenizer(tokenizers_dir["words"], max_length=3)
    prompt, (result,) = encode(tokenizer, (("user", "w1 w2"),), "w3")
    assert (result.tokens, result.truncated) == ([5], True)
    with pytest.raises(BadPrompt, match=r"has 3 tokens: no room for a response within max_length=3; raise max_length"):
        tokenizer.encode_prompt((("user", "w1 w2 w3"),))


def test_a_response_that_disappears(tokenizers_dir, tmp_path):
    text = "{% for m in messages %}[{{ m.content.split('|')[0] }}]{% endfor %}"
    (tmp_path / "first_word.jinja").write_text(text + "{% if not add_generation_prompt %}</s>{% endif %}")
    tokenizer = ChatTokenizer(tokenizers_dir["unmarked"], str(tmp_path / "first_word.jinja"))
    _, (gone, kept) = encode(tokenizer, (("user", "x"),), "|thought", "in|thought")
    assert isinstance(gone, BadRecord) and gone.kind == "response_without_tokens"
    assert decode(tokenizer, kept.tokens) == "[in]</s>" and kept.change == "cut"


def test_a_special_token_in_the_text_of_a_response_is_noticed(tokenizers_dir):
    tokenizer = ChatTokenizer(tokenizers_dir["chatml"])
    _, results = encode(tokenizer, CHAT, "in<|im_end|>", "in")
    assert [r.special_in_text for r in results] == [True, False]


def test_template_override_and_its_errors(tokenizers_dir, tmp_path):
    def override(text):
        (tmp_path / "t.jinja").write_text(text)
        return ChatTokenizer(tokenizers_dir["chatml"], str(tmp_path / "t.jinja"))

    tokenizer = override("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    prompt, (result,) = encode(tokenizer, CHAT, "in")
    assert prompt.text == "be kind<|im_end|>the thing<|im_end|>"
    assert decode(tokenizer, result.tokens) == "in<|im_end|>"
    assert tokenizer.template_hash != ChatTokenizer(tokenizers_dir["chatml"]).template_hash
    assert tokenizer.hash == ChatTokenizer(tokenizers_dir["chatml"]).hash
    assert tokenizer.hash != ChatTokenizer(tokenizers_dir["llama3"]).hash
    for text, says in [
        ("{% for m in messages %}", "refuses the conversation"),
        ("{{ messages[0].content }}", "does not print the assistant's response"),
    ]:
        with pytest.raises(UserError, match=says) as error:
            override(text)
        assert "t.jinja" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        ChatTokenizer(tokenizers_dir["chatml"], str(tmp_path / "none.jinja"))


def test_a_template_that_refuses_one_prompt(tokenizers_dir, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer = ChatTokenizer(tokenizers_dir["chatml"], str(tmp_path / "t.jinja"))
    with pytest.raises(BadPrompt, match="no system"):
        tokenizer.encode_prompt(CHAT)


def test_not_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        ChatTokenizer(str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot be opened as a tokenizer") as error:
        ChatTokenizer(str(tmp_path))
    assert "\n" not in str(error.value)
