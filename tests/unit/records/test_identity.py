"""A data set and a model that do not belong together are refused in one line; what makes no difference is not."""

import json
import shutil

import pytest
from test_manifest import as_format

from fuserl_megatron.cli import main
from fuserl_megatron.records import belonging
from fuserl_megatron.records.belonging import check_tokenizers, compare
from fuserl_megatron.records.identity import own_template
from fuserl_megatron.util.errors import UserError

SYSTEM = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"

MODEL = dict(model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8)
MODEL |= dict(num_key_value_heads=4, vocab_size=400, max_position_embeddings=512)


@pytest.fixture
def chatml(build_dataset, make_record, tokenizers_dir):
    """A data set made with the chatml tokenizer."""
    answers = enumerate(("the", "hell"))
    records = [make_record(prompt=p, response=r, reward=n) for n, r in answers for p in ("the hill", "in")]
    return build_dataset(records, tokenizer=tokenizers_dir["chatml"])


@pytest.fixture
def copy(tmp_path, tokenizers_dir):
    """copy(change) -> a copy of the chatml tokenizer with its files' values changed."""

    def make(change=None, name="tokenizer.json", source="chatml"):
        target = tmp_path / "copy"
        shutil.copytree(tokenizers_dir[source], target)
        if change is not None:
            values = json.loads((target / name).read_text())
            change(values)
            (target / name).write_text(json.dumps(values))
        return target

    return make


def test_another_tokenizer_is_refused_and_can_be_overruled(chatml, tokenizers_dir):
    for name in ("llama3", "words", "metaspace", "unmarked"):
        with pytest.raises(UserError) as error:
            compare(str(chatml.path), "model.path", tokenizers_dir[name])
        message = str(error.value)
        assert message.startswith(f"data.path={chatml.path}: made with the tokenizer of {tokenizers_dir['chatml']}")
        assert "\n" not in message and "run.disable_checks=[tokenizer_match]" in message
    both = ("tokenizer_match", "template_match")
    assert compare(str(chatml.path), "model.path", tokenizers_dir["llama3"], both) == []


def test_the_same_tokenizer_is_known_by_its_files_alone(chatml, copy, monkeypatch):
    monkeypatch.setattr(belonging, "ChatTokenizer", None)  # nothing is opened
    assert compare(str(chatml.path), "model.path", str(copy())) == []


def swap(vocab, a, b):
    vocab[a], vocab[b] = vocab[b], vocab[a]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: swap(t["model"]["vocab"], "h", "i"), "other ids .probe text 'english'"),
        (lambda t: t["model"]["merges"].pop(0), "other ids .probe text"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "other ids .probe text 'english'"),
        (
            lambda t: [a.update(content="<|end|>") for a in t["added_tokens"] if a["content"] == "<|im_end|>"],
            "end of turn",
        ),
    ],
    ids=["ids", "merges", "normaliser", "end of turn"],
)
def test_a_difference_that_changes_ids_is_found(chatml, copy, change, says):
    directory = copy(change)
    if says == "end of turn":
        config = json.loads((directory / "tokenizer_config.json").read_text())
        text = json.dumps(config).replace("<|im_end|>", "<|end|>")
        (directory / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match="is another one: .*" + says):
        compare(str(chatml.path), "model.path", str(directory))


def test_ids_of_the_data_that_no_probe_has_are_compared_too(chatml, copy, monkeypatch):
    """Two tokens that stand in the data and in none of the fixed texts have changed places."""
    monkeypatch.setattr(belonging, "PROBES", {})
    with pytest.raises(UserError, match="ids of the data stand for other tokens"):
        compare(str(chatml.path), "model.path", str(copy(lambda t: swap(t["model"]["vocab"], "h", "i"))))


def test_what_the_data_never_use_makes_no_difference(chatml, copy):
    def longer(values):
        number = max(values["model"]["vocab"].values()) + 100
        added = dict(values["added_tokens"][0], content="<|reserved|>", id=number)
        values["added_tokens"].append(added)
        values["padding"] = None

    directory = copy(longer)
    from fuserl_megatron.records.tokenize import ChatTokenizer

    assert ChatTokenizer(str(directory)).hash != chatml.manifest.tokenizer_hash
    assert compare(str(chatml.path), "model.path", str(directory)) == []


def test_a_model_without_a_tokenizer_is_said(chatml, tmp_path):
    (tmp_path / "bare").mkdir()
    (said,) = compare(str(chatml.path), "model.path", str(tmp_path / "bare"))
    assert "not compared" in said


def test_another_rendering_is_refused_unless_it_is_meant(
    chatml, copy, build_dataset, make_record, tokenizers_dir, tmp_path
):
    """Refused where nobody asked for it; said where the model has no template, or the data were given one."""
    directory = copy()
    template = directory / "chat_template.jinja"
    same = template.read_text()
    template.write_text(same + "{# another comment #}")
    assert compare(str(chatml.path), "model.path", str(directory)) == []  # other text, same rendering
    template.write_text(same.replace("<|im_end|>\n", "<|im_end|>"))
    with pytest.raises(UserError, match=r"another chat template .*'one turn'.*run.disable_checks=\[template_match\]"):
        compare(str(chatml.path), "model.path", str(directory))
    assert compare(str(chatml.path), "model.path", str(directory), ("template_match",)) == []
    (tmp_path / "given.jinja").write_text(same)
    given = build_dataset(
        [make_record(prompt="the", response="in")],
        tokenizer=str(directory),
        chat_template=str(tmp_path / "given.jinja"),
        output=str(tmp_path / "given"),
    )
    assert given.manifest.chat_template == same and given.manifest.chat_template_given
    (said,) = compare(str(given.path), "model.path", str(directory))
    assert "exported model carries that of" in said
    template.unlink()
    (said,) = compare(str(chatml.path), "model.path", str(directory))
    assert "has no chat template" in said


def test_format_1_is_compared_by_its_hashes(chatml, copy, tokenizers_dir):
    (chatml.path / "manifest.json").write_text(json.dumps(as_format(1, chatml.path)))
    assert compare(str(chatml.path), "model.path", tokenizers_dir["chatml"]) == []
    with pytest.raises(UserError, match="is another one: vocabulary, merges or special tokens differ"):
        compare(str(chatml.path), "model.path", tokenizers_dir["llama3"])
    directory = copy()
    (directory / "chat_template.jinja").write_text(SYSTEM)
    with pytest.raises(UserError, match="which does not keep the text; build it again"):
        compare(str(chatml.path), "model.path", str(directory))


@pytest.mark.parametrize("where", ["file", "config", "list", "none"])
def test_the_template_is_the_one_that_transformers_finds(copy, where):
    from transformers import AutoTokenizer

    directory = copy()
    (directory / "chat_template.jinja").unlink()
    values = json.loads((directory / "tokenizer_config.json").read_text())
    several = [{"name": "default", "template": SYSTEM}, {"name": "tool_use", "template": "x"}]
    values |= {"config": {"chat_template": SYSTEM}, "list": {"chat_template": several}}.get(where, {})
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    if where == "file":
        (directory / "chat_template.jinja").write_text(SYSTEM)
    found = AutoTokenizer.from_pretrained(directory).chat_template
    assert own_template(str(directory)) == (found["default"] if isinstance(found, dict) else found)


def test_every_command_refuses_it_before_a_rank_starts(chatml, copy, tmp_path, capsys):
    """train, its dry run, evaluate and parity; the model, its tokenizer, the held-out set and the reference."""
    model, other = tmp_path / "model", copy(lambda t: swap(t["model"]["vocab"], "h", "i"))
    shutil.copytree(chatml.manifest.tokenizer, model)
    for directory in (model, other):
        (directory / "config.json").write_text(json.dumps(MODEL))
    data = [f"data.path={chatml.path}", "objective=fusepo_ln_dpo", f"run.results_dir={tmp_path / 'run'}", "trainer=cpu"]
    wrong = [f"model.path={other}"], [f"model.path={model}", f"model.tokenizer={other}"]
    reference = [f"model.path={model}", f"objective.reference={other}"]
    cases = [["train", "--dry-run", *words] for words in (*wrong, reference)]
    cases += [["train", *wrong[0]], ["evaluate", *wrong[0]], ["parity", *reference]]
    for words in cases:
        assert main([*words, *data]) == 2
        said = capsys.readouterr().err
        assert "is another one: it gives other ids" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert main(["train", "--dry-run", *reference, *data, "run.disable_checks=[tokenizer_match]"]) == 0


def test_a_chain_refuses_it_before_anything_is_submitted(chatml, copy, tmp_path, capsys, tokenizers_dir):
    """A data set that is there, and one that is yet to be built, by the tokenizer it is to be built with."""
    other = copy(lambda t: swap(t["model"]["vocab"], "h", "i"))
    (other / "config.json").write_text(json.dumps(MODEL))
    chain = ["launch", f"target={other}", f"run.results_dir={tmp_path / 'run'}", "fusesft.trainer=cpu"]
    cases = [["stages=[fusesft]", f"fusesft.data.path={chatml.path}"]]
    (tmp_path / "in.jsonl").write_text("")
    build = [f"build_sft.inputs=[{tmp_path}/in.jsonl]", "build_sft.reward_temperature=1"]
    cases += [["stages=[build_sft,fusesft]", *build, f"build_sft.tokenizer={chatml.manifest.tokenizer}"]]
    for words in cases:
        for mode in ([], ["--dry-run"]):
            assert main([*chain, *words, *mode]) == 2
            said = capsys.readouterr().err
            assert said.startswith("fuserl: error: fusesft: ") and "other ids (probe text 'english')" in said
            assert said.count("\n") == 1
        assert not (tmp_path / "run").exists()
        assert main([*chain, *words, "--dry-run", "train.run.disable_checks=[tokenizer_match]"]) == 0
        capsys.readouterr()
    check_tokenizers("x", str(other), str(other))
