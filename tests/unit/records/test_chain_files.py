"""A chain is refused before anything starts where a file is missing that no stage of it writes."""

import json

import pytest

from fuserl_megatron.cli import main
from fuserl_megatron.launch.chain import unfinished
from fuserl_megatron.launch.pipeline import load_pipeline
from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    save_tiny_model(folder / "model", vocab_size=128, num_hidden_layers=1)
    save_char_tokenizer(folder / "model")
    (folder / "scored.jsonl").write_text(json.dumps(dict(prompt="a", source="s", response="b", reward=1)) + "\n")
    return folder


@pytest.fixture
def words(there, monkeypatch):
    monkeypatch.chdir(there)
    words = ["target=model", "run.results_dir=run", "stages=[build_sft,fusesft,evaluate]", "train.trainer=cpu"]
    words += ["build_sft.inputs=[scored.jsonl]", "build_sft.reward_temperature=1", "evaluate.data.path=run/build_sft"]
    return [*words, "fusesft.optim.lr=1e-4", "train.data.seq_length=128"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("build_sft.inputs=[nope.jsonl]", "build_sft: inputs: nope.jsonl does not exist"),
        ("build_sft.inputs=[scored.jsonl,none-*.parquet]", "build_sft: inputs: no file matches 'none-*.parquet'"),
        ("build_sft.chat_template=scored.json", "build_sft: chat_template=scored.json: no such file; did you mean"),
        ("build_sft.tokenizer=./modle", "build_sft: tokenizer=./modle: no such directory; did you mean model?"),
        ("fusesft.data.path=nope", "fusesft: nope is not a fused data set"),
        ("fusesft.data.validation_path=nope", "fusesft: nope is not a fused data set"),
        ("fusesft.model.path=./nope", "fusesft: model.path=./nope: no such directory"),
        ("evaluate.data.path=nope", "evaluate: nope is not a fused data set"),
    ],
)
def test_what_is_missing_is_one_line_and_nothing_starts(words, there, capsys, word, expected):
    for dry in (["--dry-run"], []):
        assert main(["launch", *dry, *words, word]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"fuserl: error: {expected}") and error.count("\n") == 1, error
        assert not (there / "run").exists()


def test_what_the_chain_writes_itself_is_not_asked_for(words, there, capsys):
    assert main(["launch", "--dry-run", *words]) == 0, capsys.readouterr().err


MAKING = ["stages=[sample,score,build_sft,fusesft]", "sample.prompts=[scored.jsonl]", "sample.sources=[source.yaml]"]
MAKING += ["score.rewards=[length]", "build_sft.reward_temperature=1", "train.trainer=cpu", "train.data.seq_length=128"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("sample.prompts=[nope.jsonl]", "sample: prompts: nope.jsonl does not exist"),
        ("sample.heldout=[nope.jsonl]", "sample: heldout: nope.jsonl does not exist"),
        ("sample.sources=[sorce.yaml]", "sample: sources: sorce.yaml: no such file; did you mean source.yaml"),
        ("sample.sources.source.demonstrations=d.jsonl", "sample: sources.source.demonstrations=d.jsonl: no such file"),
        ("score.samples=[nope.jsonl]", "score: samples: nope.jsonl does not exist"),
        ("score.rewards=[skywork_v2_8b] score.rewards.skywork_v2_8b.model=./no", "score: rewards.skywork_v2_8b.model="),
        ("build_sft.inputs=[nope.jsonl]", "build_sft: inputs: nope.jsonl does not exist"),
    ],
)
def test_what_sample_and_score_read(there, monkeypatch, capsys, word, expected):
    monkeypatch.chdir(there)
    (there / "source.yaml").write_text("{model: m, url: http://127.0.0.1:9/v1}\n")
    words = ["target=model", "run.results_dir=run", *MAKING]
    assert main(["launch", "--dry-run", *words]) == 0, capsys.readouterr().err
    assert main(["launch", *words, *word.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fuserl: error: {expected}") and error.count("\n") == 1, error
    assert not (there / "run").exists()


def test_what_a_finished_stage_has_read_may_be_gone(words, there, tmp_path, capsys):
    words = [*words, f"run.results_dir={tmp_path}/run", f"evaluate.data.path={tmp_path}/run/build_sft"]
    words += ["build_sft.inputs=[gone.jsonl]"]
    pipeline = load_pipeline(words)
    build = pipeline.stages[0]
    pipeline.folder.mkdir(parents=True)
    pipeline.done_file(build).write_text(build.hash)
    assert build not in unfinished(pipeline)
    assert main(["launch", "--dry-run", *words]) == 0, capsys.readouterr().err
