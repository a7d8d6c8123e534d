"""The stage list: defaults that chain the stages, overrides of each, resources, and what is refused."""

import pytest
import yaml

from fuserl_megatron.config.load import load_config
from fuserl_megatron.launch.pipeline import load_pipeline
from fuserl_megatron.util.errors import UserError

ALL = "stages=[import,build_sft,build_po,build_heldout,fusesft,reference,fusepo,export,evaluate]"
BUILDS = [
    w for b in ("sft", "po", "heldout") for w in (f"build_{b}.inputs=[{b}.jsonl]", f"build_{b}.reward_temperature=1")
]


@pytest.fixture
def chain(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "checkpoint").mkdir()

    def load(*words, target="model", **options):
        where = [f"target={tmp_path / target}", f"run.results_dir={tmp_path / 'run'}"]
        common = [*where, "fusepo.objective=fusepo_ln_dpo"]
        pipeline = load_pipeline([*common, *words], **options)
        return pipeline, {stage.name: stage for stage in pipeline.stages}

    return load


def test_every_stage_reads_what_those_before_it_write(chain, tmp_path):
    pipeline, stages = chain(ALL, *BUILDS, "cluster=slurm", target="checkpoint")
    run = tmp_path / "run"
    assert list(stages) == ALL.partition("[")[2].rstrip("]").split(",")
    settings = {name: yaml.safe_load(stage.config) for name, stage in stages.items() if stage.config}
    assert settings["build_sft"]["tokenizer"] == settings["fusesft"]["model"]["path"] == str(run / "import")
    assert settings["fusesft"]["data"]["path"] == str(run / "build_sft") == stages["build_sft"].results_dir
    assert settings["fusepo"]["model"]["path"] == str(run / "fusesft" / "hf")
    assert settings["fusepo"]["run"]["export"] is False  # the stage export does it, without GPUs
    assert settings["reference"]["run"]["results_dir"] == settings["fusepo"]["run"]["results_dir"]
    assert stages["export"].command[2:5] == ("megatron-to-hf", str(run / "fusepo"), str(run / "export"))
    assert settings["evaluate"]["model"]["path"] == str(run / "export")
    assert settings["evaluate"]["data"]["path"] == str(run / "build_heldout")
    assert settings["evaluate"]["objective"]["reference"] == str(run / "fusesft" / "hf")
    for stage in pipeline.stages:
        position = list(stages).index(stage.name)
        assert all(list(stages).index(other) < position for other in stage.depends_on)
    assert set(stages["fusepo"].depends_on) == {"import", "build_po", "fusesft", "reference"}


def test_frozen_settings_are_those_of_the_command(chain, tmp_path):
    words = ["data.path=d", "optim.lr=1e-6", 'run.name="a, b"', "trainer=cpu"]
    pipeline, stages = chain("stages=[fusesft]", *(f"fusesft.{word}" for word in words))
    model = [f"model.path={tmp_path / 'model'}", f"run.results_dir={tmp_path / 'run' / 'fusesft'}"]
    expected = load_config("train", [*model, *words])
    frozen = tmp_path / "frozen.yaml"
    frozen.write_text(stages["fusesft"].config)
    assert load_config("train", config_name=str(frozen)) == expected
    assert stages["fusesft"].command == ("fuserl", "train", "--config-name", stages["fusesft"].config_path)


def test_sections_in_a_file_and_shared_settings(chain, tmp_path):
    (tmp_path / "my.yaml").write_text(
        "defaults: [{cluster: slurm}, _self_]\nstages: [fusesft, fusepo, evaluate]\ncluster: {gpus_per_node: 8}\n"
        "train: {trainer: gpu, model.tensor_model_parallel_size: 2}\n"
        "fusesft: {data: {path: sft}, optim: {lr: 1e-6}, run.name: '12', cluster: {nodes: 4, time: '01:00:00'}}\n"
        "fusepo: {data.path: po, data.validation_path: held}\n"
    )
    pipeline, stages = chain("fusesft.optim.lr=2e-6", config_dir=tmp_path, config_name="my")
    sft = yaml.safe_load(stages["fusesft"].config)
    assert (sft["optim"]["lr"], sft["run"]["name"], sft["data"]["path"]) == (2e-6, "12", "sft")
    sft, po = stages["fusesft"], stages["fusepo"]
    assert (sft.cluster.nodes, sft.cluster.num_ranks, sft.cluster.time) == (4, 32, "01:00:00")
    assert (po.cluster.nodes, po.cluster.ranks_per_node, po.cluster.time) == (1, 8, None)
    assert all(yaml.safe_load(s.config)["model"]["tensor_model_parallel_size"] == 2 for s in pipeline.stages)
    assert yaml.safe_load(stages["evaluate"].config)["data"]["path"] == "held"


def test_what_has_nothing_to_do_is_left_out_and_said(chain):
    pipeline, stages = chain(
        "stages=[import,fusesft,reference,fusepo]",
        "fusesft.data.path=a",
        "fusepo.data.path=b",
        "fusepo.objective=fusepo_simpo",
    )
    assert list(stages) == ["fusesft", "fusepo"]
    assert [note.partition(":")[0] for note in pipeline.notes] == ["import", "reference"]


def test_a_chain_of_adapters_writes_its_merged_models_itself(chain, tmp_path):
    pipeline, stages = chain(ALL, *BUILDS, "train.adapter=lora", "train.adapter.rank=4")
    settings = {name: yaml.safe_load(stage.config) for name, stage in stages.items() if stage.config}
    assert settings["fusepo"]["adapter"] | {"kind": "lora", "rank": 4} == settings["fusepo"]["adapter"]
    assert settings["fusepo"]["run"]["export"] and settings["fusesft"]["run"]["export"]
    assert "export" not in stages and "reference" not in stages and "nothing to do" in "".join(pipeline.notes)
    assert settings["evaluate"]["model"]["path"] == str(tmp_path / "run" / "fusepo" / "hf")
    assert settings["evaluate"]["adapter"]["kind"] == "none"
    with pytest.raises(UserError, match="later stages read the model; adapter.export=merged would work"):
        chain(*BUILDS[:4], "train.adapter=lora", "fusepo.adapter.export=adapter")


def test_the_hash_follows_the_settings_and_those_upstream_but_not_the_resources(chain):
    words = ["stages=[fusesft,fusepo]", "fusesft.data.path=a", "fusepo.data.path=b"]
    before = {name: stage.hash for name, stage in chain(*words)[1].items()}
    assert {name: stage.hash for name, stage in chain(*words, "cluster.time=1:00")[1].items()} == before
    after = {name: stage.hash for name, stage in chain(*words, "fusesft.optim.lr=1")[1].items()}
    assert after["fusesft"] != before["fusesft"] and after["fusepo"] != before["fusepo"]
    after = {name: stage.hash for name, stage in chain(*words, "fusepo.optim.lr=1")[1].items()}
    assert after["fusesft"] == before["fusesft"] and after["fusepo"] != before["fusepo"]


def test_one_process_stages_take_no_gpus_unless_they_ask(chain):
    words = [
        "stages=[build_sft,fusesft,evaluate]",
        *BUILDS[:2],
        "cluster=slurm",
        "cluster.nodes=2",
        "cluster.gpus_per_node=4",
    ]
    _, stages = chain(*words, "evaluate.command='eval --model {model} -o x'", "evaluate.cluster.gpus_per_node=1")
    assert [(s.cluster.num_ranks, s.cluster.gpus_per_node) for s in stages.values()] == [(1, None), (8, 4), (1, 1)]
    assert stages["evaluate"].command[:2] == ("eval", "--model") and stages["evaluate"].command[2].endswith(
        "fusesft/hf"
    )


def test_on_this_machine_a_stage_takes_the_ranks_of_its_layout(chain):
    """As `fuserl train` does; said otherwise, that is taken; on a cluster nothing is guessed."""
    words = ["stages=[fusesft,fusepo]", "fusesft.data.path=a", "fusepo.data.path=b"]
    words += ["train.model.tensor_model_parallel_size=2", "fusepo.model.pipeline_model_parallel_size=2"]
    assert [stage.cluster.num_ranks for stage in chain(*words)[0].stages] == [2, 4]
    assert [stage.cluster.num_ranks for stage in chain(*words, "cluster.gpus_per_node=8")[0].stages] == [8, 8]
    assert chain(*words, "fusesft.cluster.ntasks_per_node=6")[1]["fusesft"].cluster.num_ranks == 6
    with pytest.raises(UserError, match="ranks in all = 1"):
        chain(*words, "cluster=slurm")


def test_the_chain_s_end_says_whether_it_helped(chain, tmp_path):
    """What is evaluated is compared with the target, or with what is said, or with nothing."""
    words = ["stages=[fusesft,evaluate]", "fusesft.data.path=a", "evaluate.data.path=held"]
    command = chain(*words)[1]["evaluate"].command
    assert command[:4] == ("fuserl", "evaluate", "--before", str(tmp_path / "model"))
    assert chain(*words, "evaluate.before=other")[1]["evaluate"].command[2:4] == ("--before", "other")
    assert "--before" not in chain(*words, "evaluate.before=null")[1]["evaluate"].command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fusesfft.optim.lr=1"], "fusesfft.optim.lr: no such key. Did you mean fusesft?"),
        (["fusesft.optim.lrr=1"], "fusesft: optim.lrr: no such key. Did you mean optim.lr?"),
        (["cluster.nodess=1"], "cluster.nodess: no such key. Did you mean cluster.nodes?"),
        (["fusesft.cluster.nodess=1"], "cluster.nodess: no such key. Did you mean cluster.nodes?"),
        (["import.dtype=x"], "import.dtype: no such key."),
        (["stages=[fusesft,fusepoo]"], "Did you mean fusepo?"),
        (["stages=[fusesft,fusesft]"], "named twice"),
        (["stages=[]"], "nothing to run"),
        (["stages=[export]"], "neither fusesft nor fusepo"),
        (["stages=[fusesft,reference]"], "which is not among the stages"),
        (["fusesft=3"], "fusesft is a section"),
        (["cluster.nodes=2"], "cluster=local is one machine"),
        (["cluster.env=[NCCL_DEBUG]"], "is no NAME=value"),
        (["target=/nowhere"], "holds no config.json"),
        (["fusesft.objective=fusepo_dpo"], "fusesft: objective.stage=fusepo: this stage is fusesft"),
        (
            ["fusesft.model.tensor_model_parallel_size=2", "cluster.ntasks_per_node=1"],
            "fusesft: cluster: ranks in all = 1, must be a multiple of TP x PP x CP = 2; "
            "fusesft.cluster.ntasks_per_node=2 would work",
        ),
        (
            ["stages=[fusesft,fusepo]", "fusesft.run.export=false", "fusepo.data.path=x"],
            "fusepo starts from its export",
        ),
    ],
)
def test_mistakes_are_one_line(chain, words, said):
    with pytest.raises(UserError) as caught:
        chain("stages=[fusesft]", "fusesft.data.path=x", *words)
    assert said in str(caught.value) and "\n" not in str(caught.value)
