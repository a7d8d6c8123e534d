"""The stages sample and score of a chain: defaults, frozen settings, resources, mistakes, and a real run."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from stub_server import Stub

from fuserl_megatron.cli import main
from fuserl_megatron.config.sample_load import load_sample
from fuserl_megatron.config.score_load import load_score
from fuserl_megatron.launch.chain import launch, unfinished
from fuserl_megatron.launch.pipeline import load_pipeline
from fuserl_megatron.launch.slurm import job_script
from fuserl_megatron.util.errors import UserError

STAGES = "stages=[sample,score,build_sft,build_po,build_heldout,fusesft,fusepo]"


@pytest.fixture
def words(tmp_path):
    """A chain of prompts, a source that runs elsewhere, one whose server is started, and a rule."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "there.yaml").write_text('{model: m, url: http://127.0.0.1:9/v1, sampling: {stop: ["\\n\\n"]}}\n')
    (tmp_path / "ours.yaml").write_text("{name: our-own, model: m}\n")
    made = [f"sample.prompts=[{tmp_path}/prompts.jsonl]", "sample.sources.there.sampling.temperature=0.5"]
    made += [f"sample.sources=[{tmp_path}/there.yaml,{tmp_path}/ours.yaml]", "score.rewards=[length,mine]"]
    made += ["score.rewards.mine.kind=rule", 'score.rewards.mine.function="my:rule"', "score.combine.weights.mine=2"]
    builds = [f"build_{name}.reward_temperature=1" for name in ("sft", "po", "heldout")]
    where = [f"target={tmp_path / 'model'}", f"run.results_dir={tmp_path / 'run'}", "build_heldout.inputs=[held.jsonl]"]
    return [*where, STAGES, *made, *builds, "fusepo.objective=fusepo_ln_dpo"]


def stages_of(words):
    pipeline = load_pipeline(words)
    return pipeline, {stage.name: stage for stage in pipeline.stages}


def test_each_reads_what_those_before_it_write(words, tmp_path):
    _, stages = stages_of(words)
    run = tmp_path / "run"
    assert list(stages)[:3] == ["sample", "score", "build_sft"]
    settings = {name: yaml.safe_load(stage.config) for name, stage in stages.items()}
    assert settings["sample"]["output"] == stages["sample"].results_dir == str(run / "sample")
    # by name: the answers of a source that was taken out of the list are not scored
    assert settings["score"]["samples"] == [str(run / "sample" / "there"), str(run / "sample" / "our-own")]
    for build in ("build_sft", "build_po"):
        assert settings[build]["inputs"] == [str(run / "score")] == [settings["score"]["output"]]
        assert stages[build].depends_on == ("score",)
    assert settings["build_heldout"]["inputs"] == ["held.jsonl"] and stages["build_heldout"].depends_on == ()
    assert stages["score"].depends_on == ("sample",) and stages["sample"].depends_on == ()
    other = stages_of([*words, "score.samples=[my.jsonl]", "build_po.inputs=[b.jsonl]"])[1]
    assert yaml.safe_load(other["score"].config)["samples"] == ["my.jsonl"]
    assert yaml.safe_load(other["build_po"].config)["inputs"] == ["b.jsonl"]


def test_frozen_settings_are_those_of_the_commands(words, tmp_path):
    """The frozen tree alone gives what the sources' own files and the overrides gave; those may be gone."""
    pipeline, stages = stages_of(words)
    for stage in (stages["sample"], stages["score"]):
        for path, text in {stage.config_path: stage.config, **stage.more_config}.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)
    given = [word.partition("sample.")[2] for word in words if word.startswith("sample.")]
    expected, sources = load_sample([*given, f"output={tmp_path}/run/sample"])
    for name in ("there", "ours"):
        (tmp_path / f"{name}.yaml").unlink()
    folder, command = pipeline.folder, stages["sample"].command
    assert command == ("fuserl", "sample", "--config-dir", str(folder), "--config-name", str(folder / "sample.yaml"))
    config, frozen = load_sample((), folder, str(folder / "sample.yaml"))
    assert frozen == sources and (config.n, config.prompts) == (expected.n, expected.prompts)
    assert [source.name for source in frozen] == ["there", "our-own"]
    assert (frozen[0].sampling.temperature, frozen[0].sampling.stop) == (0.5, ("\n\n",))
    config, rewards = load_score((), folder, str(folder / "score.yaml"))
    assert config.combine.weights == {"mine": 2} and rewards["mine"].function == "my:rule"
    assert rewards["length"] == load_score(["samples=x", "output=x", "rewards=[length]"])[1]["length"]


def test_the_hash_follows_every_source_and_reward(words):
    words = [*words, "stages=[sample,score,build_sft]"]
    before = {name: stage.hash for name, stage in stages_of(words)[1].items()}

    def changed(word):
        return {name for name, stage in stages_of([*words, word])[1].items() if stage.hash != before[name]}

    assert changed("sample.sources.ours.system=Hello") == {"sample", "score", "build_sft"}
    assert changed("score.rewards.length.arguments.target=7") == {"score", "build_sft"}
    assert changed("sample.cluster.time=1:00") == set()


def test_resources_and_requeue(words):
    """One process; GPUs only for servers of our own (all of a node) or a reward model (one)."""
    words = [*words, "stages=[sample,score,build_sft,fusesft]"]
    words += ["cluster=slurm", "cluster.gpus_per_node=8", "cluster.nodes=2", "sample.cluster.time=12:00:00"]
    pipeline, stages = stages_of(words)
    got = {name: (stage.cluster.num_ranks, stage.cluster.gpus_per_node) for name, stage in stages.items()}
    assert (got["score"], got["build_sft"], got["fusesft"]) == ((1, None), (1, None), (16, 8))
    assert (got["sample_there"], got["sample_our_own"]) == ((1, None), (1, 8))
    script = job_script(pipeline, stages["sample_our_own"])
    assert "#SBATCH --signal=B:USR1@300\n" in script and "#SBATCH --time=12:00:00\n" in script
    assert "#SBATCH --signal" not in job_script(pipeline, stages["build_sft"])
    elsewhere = [word for word in words if not word.startswith("sample.sources=")]
    (there,) = [re.search(r"\[(.*?),", word)[1] for word in words if word.startswith("sample.sources=")]
    got = stages_of([*elsewhere, f"sample.sources=[{there}]", "score.rewards=[length,mine,skywork_v2_8b]"])[1]
    assert (got["sample"].cluster.gpus_per_node, got["score"].cluster.gpus_per_node) == (None, 1)


def test_a_job_for_each_source_and_tasks_for_its_shards(words, tmp_path):
    words = [*words, "stages=[sample,logprobs,score,build_sft]", "cluster=slurm", "sample.shards=3"]
    words += ["sample.cluster.time=9:00", "sample.sources.there.cluster.time=5:00"]
    words += ["logprobs.sources.there.max_in_flight=7"]
    pipeline, stages = stages_of(words)
    names = ["sample_there", "sample_our_own", "logprobs_there", "logprobs_our_own", "score", "build_sft"]
    assert list(stages) == names
    assert stages["logprobs_there"].depends_on == ("sample_there", "sample_our_own")
    assert stages["score"].depends_on == tuple(names[:4])
    assert [stages[name].tasks for name in names] == [3, 3, 0, 0, 0, 0]
    assert (stages["sample_there"].cluster.time, stages["sample_our_own"].cluster.time) == ("5:00", "9:00")
    settings = {name: yaml.safe_load(stage.config) for name, stage in stages.items()}
    run = tmp_path / "run"
    written = [str(run / "sample" / source) for source in ("there", "our-own")]
    assert settings["sample_there"]["sources"] == settings["logprobs_there"]["sources"] == ["there"]
    assert settings["logprobs_there"]["samples"] == settings["score"]["samples"] == written
    assert settings["score"]["logprobs"] == [str(run / "logprobs" / source) for source in ("there", "our-own")]
    # a source may be set otherwise there, and is frozen apart
    files = {**stages["sample_there"].more_config, **stages["logprobs_there"].more_config}
    assert [yaml.safe_load(text)["max_in_flight"] for text in files.values()] == [256, 7]
    assert f"{run}/launch/logprobs" in stages["logprobs_there"].command
    script = job_script(pipeline, stages["sample_there"])
    assert "#SBATCH --array=0-2\n" in script and "sample_there_%a.log\n" in script
    assert "\nlogs+=/task_$SLURM_ARRAY_TASK_ID\ndone_file+=.$SLURM_ARRAY_TASK_ID\n" in script
    assert "--array" not in job_script(pipeline, stages["score"])
    stage = stages["sample_there"]
    for task in range(3):
        assert not pipeline.is_done(stage)
        pipeline.folder.mkdir(parents=True, exist_ok=True)
        (pipeline.folder / f"sample_there.done.{task}").write_text(stage.hash)
    assert pipeline.is_done(stage)
    # on this machine one process asks them all, one shard after the other
    here = stages_of([*(w for w in words if w != "cluster=slurm" and "there.cluster" not in w)])[1]
    assert list(here) == ["sample", "logprobs", "score", "build_sft"] and here["sample"].tasks == 0


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sample.nn=3", "sample: nn: no such key. Did you mean n?"),
        ("sample.sources.thre.model=x", "sample: sources.thre.model: no such source. There are: there, ours."),
        ("sample.sources.there.modl=x", "sample: source there: modl: no such key. Did you mean model?"),
        ("sample.sources=[]", "sample: sources=[]: needs at least one; type sample.sources=[NAME]"),
        ("sample.prompts=[]", "sample: prompts=[]: needs at least one; type sample.prompts=[prompts.jsonl]"),
        ("score.rewards=[lenght,mine]", "score: rewards: no lenght.yaml in conf/reward. Did you mean length?"),
        ("score.rewards.mine.functoin=x", "score: rewards.mine: functoin: no such key. Did you mean function?"),
        ("score.polcy.empty=stop", "score: polcy.empty: no such key."),
        ("scor.rewards=[length]", "scor.rewards: no such key. Did you mean score?"),
        ("sample=3", "sample is a section"),
        (
            "sample.sources.there.cluster.time=1:00",
            "sample: sources.there.cluster.time: is no job of its own: on SLURM",
        ),
        ("sample.shards=0", "sample: shards=0: must be at least 1; shards=1 would work."),
        ("sample.cluster.nodess=1", "cluster.nodess: no such key. Did you mean cluster.nodes?"),
    ],
)
def test_mistakes_are_one_line(words, word, said):
    taken = [other for other in words if not other.startswith(word.partition("=")[0] + "=")]
    taken = [other for other in taken if not (word.endswith("=[]") and other.startswith("sample.sources."))]
    with pytest.raises(UserError) as caught:
        load_pipeline([*taken, word])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def real_chain(folder, url, stages):
    """A chain over a stub and the rule `length`, on a tiny model."""
    from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model

    save_tiny_model(folder / "model", vocab_size=128, num_hidden_layers=1)
    save_char_tokenizer(folder / "model")
    rows = [{"prompt": f"question {i}", "meta": {"i": i}} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in "ab":
        source = f"{{model: m, url: {url}, system: {name}, sampling: {{max_tokens: 100}}}}\n"
        (folder / f"{name}.yaml").write_text(source)
    words = [f"target={folder}/model", f"run.results_dir={folder}/run", f"stages=[{stages}]", "sample.n=2"]
    words += [f"sample.prompts=[{folder}/prompts.jsonl]", f"sample.sources=[{folder}/a.yaml,{folder}/b.yaml]"]
    words += ["score.rewards=[length]", "score.rewards.length.arguments={unit: characters, target: 250}"]
    words += ["score.rewards.length.workers=1", "score.policy.truncated=drop", "build_sft.max_length=512"]
    words += ["build_sft.reward_temperature=1", "train.trainer=cpu", "train.data.seq_length=512"]
    return [
        *words,
        "fusesft.trainer.max_epochs=null",
        "fusesft.trainer.max_steps=2",
        "fusesft.data.global_batch_size=4",
    ]


@pytest.mark.slow
def test_from_prompts_to_an_exported_model(tmp_path, capfd):
    """One command, real stages; the sampling is stopped in its middle first, and the same command goes on."""
    with Stub(seed=3).running() as stub:
        stub.delay = 0.2
        words = real_chain(tmp_path, stub.url, "sample,score,build_sft,fusesft,export")
        words += ["sample.sources.a.max_in_flight=1", "sample.sources.b.max_in_flight=1"]
        first = subprocess.Popen([sys.executable, "-m", "fuserl_megatron.cli", "launch", *words])
        deadline = time.monotonic() + 300
        while stub.counts["answers"] < 12 and time.monotonic() < deadline:
            time.sleep(0.02)
        first.send_signal(signal.SIGUSR1)
        assert first.wait(300) == 0
        run = tmp_path / "run"
        assert "sample was stopped and has kept its work; the same command goes on with it" in capfd.readouterr().out
        assert (run / "sample" / "REQUEUE").exists() and not list((run / "launch").glob("*.done"))
        assert not (run / "score").exists()
        kept = sum(len(file.read_text().splitlines()) for file in run.glob("sample/*/part-*.jsonl"))
        assert 6 <= kept < 48
        stub.delay, asked = 0.0, stub.counts["answers"]
        assert main(["launch", *words]) == 0, capfd.readouterr().err
    # what was there is not asked for again; the prompt that proves a server is no answer
    assert stub.counts["answers"] - asked <= 48 - kept + 8
    rows = [json.loads(line) for file in run.glob("sample/*/part-*.jsonl") for line in file.read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 48
    records = [json.loads(line) for line in (run / "score" / "records.jsonl").read_text().splitlines()]
    assert {record["source"] for record in records} == {"a", "b"}
    assert len(records) == sum(row["finish_reason"] == "stop" for row in rows)
    assert (run / "export" / "config.json").is_file()
    pipeline = load_pipeline(words)
    assert unfinished(pipeline) == [] and launch(pipeline, words, dry_run=False) == 0
    more = load_pipeline([*words, "sample.n=3"])
    assert [stage.name for stage in unfinished(more)] == ["sample", "score", "build_sft", "fusesft", "export"]
