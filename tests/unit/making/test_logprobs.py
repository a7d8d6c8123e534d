"""`fuserl logprobs` against a server whose log-probabilities are known, and what `fuserl score` makes of them."""

import json
from pathlib import Path

import pytest
from sampling_case import quick, refused, rows_of  # noqa: F401

from fuserl_megatron.config.sample_sections import LogprobsConfig
from fuserl_megatron.config.score_sections import RuleReward, ScoreConfig
from fuserl_megatron.making.logprobs import dry_run, logprobs
from fuserl_megatron.making.sample import sample
from fuserl_megatron.making.sample_plan import status
from fuserl_megatron.making.score import score
from fuserl_megatron.util.errors import UserError

FIELDS = {"model", "messages", "temperature", "top_p", "max_tokens", "seed", *(f"other{i}" for i in range(9))}


@pytest.fixture
def case(settings, stub, tmp_path):
    """A function that samples two sources and gives (LogprobsConfig, their settings)."""
    stub.tokenizes = True

    def make(count=6, n=2, source=None, **run):
        config, one = settings(count, n=n, source=source)
        two = settings(count, n=n, source={"name": "b", "system": "be brief"})[1]
        sample(config, [one, two])
        run = {"samples": (config.output,), "output": str(tmp_path / "logps"), "grace": 5.0} | run
        return LogprobsConfig(**run), [one, two]

    return make


def expected(text, ends=True):
    """The stub's values: of each character, and of the token 3 that ends the turn."""
    values = [-(token % 7) / 4 - 0.25 for token in [*map(ord, text), *([3] if ends else [])]]
    return sum(values) / len(values)


def means(config, name):
    return {row["key"]: row["mean_logp"] for row in rows_of(config, name)}


def test_every_source_is_asked_about_every_answer(case, stub, capsys):
    config, sources = case()
    stub.counts.clear()
    assert dry_run(config, sources) == ["a: 24 answers, 0 there", "b: 24 answers, 0 there"]
    assert logprobs(config, sources) == 0
    answers = {row["key"]: row for name in "ab" for row in rows_of(LogprobsConfig(output=config.samples[0]), name)}
    for name in "ab":
        rows = rows_of(config, name)
        assert {row["key"] for row in rows} == set(answers) and len(rows) == 24
        for row in rows:
            text = answers[row["key"]]["response"]
            assert row["mean_logp"] == pytest.approx(expected(text)) and row["tokens"] == len(text) + 1
    out = capsys.readouterr().out
    assert "with the token 3 that ends the turn" in out and "a: log-probabilities of 24 answers" in out
    assert logprobs(config, sources) == 0 and "nothing to do" in capsys.readouterr().out
    assert status(config.output) == 0


def test_faults_and_new_answers_ask_only_for_what_is_missing(case, stub, capsys):
    config, sources = case()
    stub.share = 0.3
    logprobs(config, sources)
    before = means(config, "a")
    stub.share = 0.0
    grown, _ = case(n=3)
    stub.counts.clear()
    logprobs(grown, sources)
    after = means(grown, "a")
    assert before.items() <= after.items() and len(after) == 36
    assert stub.counts["answers"] == 2 * (12 + 2)  # and two probes each


def test_another_plan_is_refused(case, stub):
    config, (one, two) = case()
    logprobs(config, [one])
    with pytest.raises(UserError, match="system null there, be brief here"):
        logprobs(config, [type(two)(**vars(two) | {"name": "a"})])
    with pytest.raises(UserError, match="top_k 0 there, 2 here"):
        logprobs(LogprobsConfig(**vars(config) | {"top_k": 2}), [one])


def test_likeliest_tokens(case, stub):
    config, (one, _) = case(1, n=1, top_k=2)
    logprobs(config, [one])
    row = rows_of(config, "a")[0]
    assert len(row["token_ids"]) == len(row["top"]) == row["tokens"]
    assert row["top"][0] == [[row["token_ids"][0] + 1, -0.001], [row["token_ids"][0] + 2, -0.002]]


def test_a_base_model_is_scored_without_an_end(case, stub):
    config, (one, _) = case(2, n=1, source={"kind": "completion"})
    logprobs(config, [one])
    answers = {row["key"]: row["response"] for row in rows_of(LogprobsConfig(output=config.samples[0]), "a")}
    # the blank in front belongs to the answer
    own = [row for row in rows_of(config, "a") if row["key"] in answers]
    assert own and all(row["mean_logp"] == pytest.approx(expected(" " + answers[row["key"]], False)) for row in own)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizes": False}, "has no /tokenize: log-probabilities of answers need a vLLM server"),
        ({"between": [77, 78, 79]}, "its template puts 3 tokens between the prompt and an answer; if it is a block of"),
        ({"fields": FIELDS}, "knows no prompt_logprobs: log-probabilities of answers need a vLLM server"),
    ],
)
def test_what_is_found_before_the_first(case, stub, change, says):
    config, (one, _) = case()
    for name, value in change.items():
        setattr(stub, name, value)
    with pytest.raises(UserError, match=says) as caught:
        logprobs(config, [one])
    assert "\n" not in str(caught.value)
    assert not list(Path(config.output).glob("a/part-*"))


def test_a_server_without_prompt_logprobs(case, stub, monkeypatch):
    config, (one, _) = case()
    reply = stub.reply
    stub.reply = lambda body: {k: v for k, v in reply(body).items() if k != "prompt_logprobs"}
    with pytest.raises(UserError, match="gives no prompt_logprobs: log-probabilities of answers need a vLLM server"):
        logprobs(config, [one])


def test_they_reach_the_records(case, stub, tmp_path):
    config, sources = case()
    rewards = {"length": RuleReward(function="fuserl_megatron.making.builtin_rules:length")}
    scored = ScoreConfig(
        samples=config.samples, output=str(tmp_path / "scored"), rewards=("length",), logprobs=(config.output,)
    )
    with pytest.raises(UserError, match="no such directory"):
        score(scored, rewards)
    logprobs(config, sources)
    report = score(scored, rewards, say=lambda line: None)
    records = [json.loads(line) for line in (tmp_path / "scored" / "records.jsonl").read_text().splitlines()]
    assert report["logprobs"] == {"a": len(records), "b": len(records)}
    for record in records:
        known = pytest.approx(expected(record["response"]))
        assert record["source_mean_logps"] == {"a": known, "b": known}
    again = ScoreConfig(**vars(scored) | {"logprobs": ()})
    score(again, rewards, say=lambda line: None)
    assert "source_mean_logps" not in (tmp_path / "scored" / "records.jsonl").read_text()


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_an_answers_own_log_probability(settings, stub, kind):
    config, source = settings(2, n=1, source={"logprobs": True, "kind": kind})
    sample(config, [source])
    for row in rows_of(config):
        length = 65 * 4 - (kind == "completion")  # the stub's own text; of a completion the blank at its end is cut
        assert row["source_mean_logps"] == {"a": pytest.approx(-(0.5 + 0.26) / 2)} and len(row["response"]) == length


def test_a_server_without_log_probabilities(settings, stub):
    config, source = settings(2, source={"logprobs": True})
    reply = stub.reply
    stub.reply = lambda body: reply(body | {"logprobs": False})
    refused(config, source, "no log-probabilities in the reply: this server gives none; leave logprobs out")
