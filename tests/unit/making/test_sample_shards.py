"""`fuserl sample shards=N`: disjoint parts in folders of their own, read as one."""

import json
from pathlib import Path

import pytest
from sampling_case import content_of, quick, refused, rows_of  # noqa: F401

from fuserl_megatron.making.finished import account_directories, finished_rows
from fuserl_megatron.making.sample import sample, shards_of
from fuserl_megatron.making.sample_plan import dry_run, status
from fuserl_megatron.util.errors import UserError


def all_rows(config):
    return [row for directory in account_directories(config.output) for row in finished_rows(directory)]


def test_tasks_of_an_array_have_together_what_one_run_has(settings, stub, tmp_path, monkeypatch, capsys):
    config, source = settings(20, n=2)
    sample(config, [source])
    whole = content_of(rows_of(config))
    config, _ = settings(20, n=2, shards=3, output=str(tmp_path / "parts"))
    stub.counts.clear()
    for task in (2, 0):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        assert sample(config, [source]) == 0
    with pytest.raises(UserError, match="shard-0001-of-0003 is not begun; sample all of its shards first"):
        account_directories(config.output)
    assert status(config.output) == 1
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert sample(config, [source]) == 0
    rows = all_rows(config)
    page = (Path(config.output) / "report.html").read_text()
    assert all(f"a/shard-000{i}-of-0003" in page for i in range(3))
    assert content_of(rows) == whole and len(rows) == 40 and stub.counts["answers"] == 40 + 3
    assert status(config.output) == 0
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(UserError, match="shards=3: this is task 3 of the array; --array=0-2 fits"):
        shards_of(config)
    # elsewhere all of them, one after the other
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    capsys.readouterr()
    stub.counts.clear()
    assert sample(config, [source]) == 0 and not stub.counts["answers"]
    assert (Path(config.output) / "report.html").exists()
    assert capsys.readouterr().out.count("nothing to do") == 3
    assert shards_of(settings(1, shards=3, shard=1)[0]) == [1]


def test_more_shards_than_prompts(settings, stub, capsys):
    config, source = settings(2, n=1, shards=8)
    assert dry_run(config, [source]) == 0
    assert "prompts: 2 of 2 rows" in capsys.readouterr().out
    assert sample(config, [source]) == 0
    assert sorted(row["prompt"] for row in all_rows(config)) == ["question 0", "question 1"]


@pytest.mark.parametrize(("first", "then"), [(1, 3), (3, 1), (3, 2)])
def test_another_number_of_shards_is_refused(settings, stub, first, then):
    config, source = settings(4, n=1, shards=first)
    sample(config, [source])
    other, _ = settings(4, n=1, shards=then)
    refused(other, source, f"was sampled with shards={first}, not {then}; give the same number")


def test_scoring_reads_all_shards(settings, stub, tmp_path):
    from fuserl_megatron.config.score_sections import RuleReward, ScoreConfig
    from fuserl_megatron.making.score import score

    config, source = settings(6, n=2, shards=2, shard=0)
    sample(config, [source])
    rewards = {"length": RuleReward(function="fuserl_megatron.making.builtin_rules:length", workers=1)}
    for samples in (config.output, f"{config.output}/a"):
        scored = ScoreConfig(samples=(samples,), output=str(tmp_path / "scored"), rewards=("length",))
        with pytest.raises(UserError, match="shard-0001-of-0002 is not begun"):
            score(scored, rewards)
    sample(settings(6, n=2, shards=2, shard=1)[0], [source])
    assert score(scored, rewards, say=lambda line: None)["answers"] == 12
    records = [json.loads(line) for line in (tmp_path / "scored" / "records.jsonl").read_text().splitlines()]
    assert len({record["key"] for record in records}) == 12
