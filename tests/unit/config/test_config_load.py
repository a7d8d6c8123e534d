import dataclasses
import json
import math
import typing

import pytest
import yaml

from fuserl_megatron.config.compose import (
    LAUNCH_GROUPS,
    RECIPE_GROUPS,
    SAMPLE_GROUPS,
    SCORE_GROUPS,
    compose_tree,
    conf_dir,
    recipes,
)
from fuserl_megatron.config.keys import all_keys, leaves, plain, plain_type
from fuserl_megatron.config.launch_sections import LaunchConfig
from fuserl_megatron.config.load import from_dict, load_config, to_yaml
from fuserl_megatron.config.sample_load import load_sample
from fuserl_megatron.config.schema import BuildConfig, Config
from fuserl_megatron.config.score_load import load_reward
from fuserl_megatron.config.score_sections import KINDS
from fuserl_megatron.config.validate import validate, validate_build
from fuserl_megatron.util.errors import UserError

PATHS = ["model.path=/m", "data.path=/d"]
BUILD = ["inputs=[a.jsonl]", "output=o", "tokenizer=t", "reward_temperature=0.01"]
CONF = conf_dir()
GROUP_FILES = sorted(file.relative_to(CONF) for file in CONF.glob("*/*.yaml"))


def error_of(kind, *overrides, **keywords):
    with pytest.raises(UserError) as caught:
        load_config(kind, overrides, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what comes out ---


def test_without_a_choice_the_schema_is_the_result():
    expected = dataclasses.asdict(Config())
    expected["model"]["path"], expected["data"]["path"] = "/m", "/d"
    actual = load_config("train", PATHS)
    assert dataclasses.asdict(actual) == expected
    assert isinstance(actual.optim.betas, tuple)


def test_build():
    actual = load_config("build", [*BUILD[1:], "inputs=[a.jsonl,b/*.parquet]", "sources=[x,y]"])
    assert (actual.inputs, actual.sources, actual.reward_temperature) == (("a.jsonl", "b/*.parquet"), ("x", "y"), 0.01)
    assert load_config("build", [*BUILD[1:], "inputs=a.jsonl"]).inputs == ("a.jsonl",)
    assert load_config("build", [*BUILD[:3], "reward_temperature=inf"]).reward_temperature == float("inf")


def test_command_line_beats_recipe_beats_group_beats_schema():
    recipe = load_config("train", [*PATHS, "recipe=llama31_8b_fusepo_dpo"])
    assert (recipe.objective.loss, recipe.objective.beta, recipe.optim.lr) == ("dpo", 0.01, 5e-7)
    assert recipe.optim.use_distributed_optimizer and not Config().optim.use_distributed_optimizer
    both = load_config("train", ["optim.lr=1", *PATHS, "recipe=llama31_8b_fusepo_dpo", "model=tiny"])
    assert (both.optim.lr, both.model.tensor_model_parallel_size, both.model.sequence_parallel) == (1.0, 2, False)


@pytest.mark.parametrize("kind, overrides", [("train", [*PATHS, "recipe=llama31_8b_fusesft"]), ("build", BUILD)])
def test_saved_yaml_gives_the_same_config_again(kind, overrides, tmp_path):
    expected = load_config(kind, overrides)
    text = to_yaml(expected)
    assert from_dict(type(expected), yaml.safe_load(text)) == expected
    saved = tmp_path / "config.yaml"
    saved.write_text(text)
    assert load_config(kind, config_name=str(saved)) == expected


def test_own_directory_on_top_of_the_shipped_tree(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("path: /mine\nlogprob_chunk_size: 7\n")
    (tmp_path / "mine.yaml").write_text(
        "defaults: [train, {override model: mine}, {override objective: fusepo_dpo}, _self_]\n"
        "data: {path: /d, global_batch_size: 8, packing: {share_prefix: on}}\n"
        "run: {results_dir: 'runs/${run.name}_${data.seq_length}'}\n"
    )
    config = load_config("train", ["run.name=x"], config_dir=tmp_path, config_name="mine")
    assert (config.model.path, config.model.logprob_chunk_size, config.objective.loss) == ("/mine", 7, "dpo")
    assert (config.run.results_dir, config.data.packing.share_prefix) == ("runs/x_2048", "on")
    assert load_config("train", ["model=tiny", "model.path=/m"], tmp_path, "mine").model.path == "/m"
    # without a root file of one's own: the shipped root over one's own groups
    assert load_config("train", ["model=mine", "data.path=/d"], tmp_path).model.path == "/mine"


def test_numbers_that_yaml_and_people_write():
    config = load_config("train", [*PATHS, "trainer.precision=32", "optim.lr=1", "optim.betas=[0,0.5]"])
    assert (config.trainer.precision, config.optim.lr, config.optim.betas) == ("32", 1.0, (0.0, 0.5))
    assert type(config.optim.lr) is float


# --- every shipped file ---


@pytest.mark.parametrize("file", [file for file in GROUP_FILES if file.parent.name not in RECIPE_GROUPS], ids=str)
def test_every_group_file_loads_and_validates(file):
    group, choice = file.parent.name, file.stem
    if group in SCORE_GROUPS:
        assert load_reward(choice, ["url=[http://here]"] if choice == "endpoint" else []).kind in KINDS
        return
    if group in SAMPLE_GROUPS:
        words = [f"sources=[{choice}]", "output=o", f"sources.{choice}.model=m", f"sources.{choice}.demonstrations=d"]
        assert load_sample(words)[1][0].name == choice
        return
    if group in LAUNCH_GROUPS:
        assert compose_tree(LaunchConfig, "config", [f"{group}={choice}"], None)[group]["type"] == choice
        return
    overrides = [*PATHS, f"{group}={choice}"]
    config = load_config("train", overrides)
    model = config.model
    size = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    assert validate(config, 4 * size)[0].endswith(
        f"DP 4 = {4 * size} ranks" + ", sequence parallel" * model.sequence_parallel
    )
    assert config != load_config("train", PATHS) or choice == "fusesft", "a file that changes nothing"


def test_every_file_is_reached():
    roots = {file.name for file in CONF.glob("*.yaml")}
    known = {"train.yaml", "build.yaml", "config.yaml", "sample.yaml", "logprobs.yaml", "score.yaml"}
    assert roots == known and len(GROUP_FILES) >= 10
    assert len(list(CONF.rglob("*"))) == len(roots) + len(GROUP_FILES) + len(list(CONF.glob("*/")))


EXAMPLES = sorted((CONF.parent / "examples").glob("*/conf/*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: f"{file.parents[1].name}/{file.name}")
def test_every_file_of_the_examples_loads_and_validates(file):
    config = load_config("train", PATHS, config_dir=file.parent, config_name=file.stem)
    model = config.model
    validate(config, model.tensor_model_parallel_size * model.pipeline_model_parallel_size)


RECIPES = json.loads((CONF.parent / "tests" / "assets" / "recipes.json").read_text())
"""Name -> all that differs from the schema's defaults, written down when every recipe was a file of its own."""


def test_recipes_are_every_method_at_every_scale():
    assert set(recipes([CONF])) == set(RECIPES) and len(RECIPES) == 28


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_composed_has_the_settings_it_had_as_a_file(name):
    config = load_config("train", [*PATHS, f"recipe={name}"])
    given, default = (dict(leaves(plain(dataclasses.asdict(c)))) for c in (config, load_config("train", PATHS)))
    differs = {key: "inf" if value == math.inf else value for key, value in given.items() if value != default[key]}
    assert differs == RECIPES[name]
    validate(config, 4 * config.model.tensor_model_parallel_size)


def test_a_method_and_a_recipe_of_one_s_own(tmp_path):
    for name, text in {
        "method/mine.yaml": "# @package _global_\ndefaults: [{override /objective: fusepo_dpo}]\noptim: {lr: 1.0e-6}\n",
        "recipe/small_fusesft.yaml": "# @package _global_\noptim: {lr: 0.5}\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    large = load_config("train", [*PATHS, "recipe=llama31_8b_mine"], config_dir=tmp_path)
    assert (large.optim.lr, large.objective.loss, large.run.name) == (1e-6, "dpo", "llama31_8b_mine")
    assert load_config("train", [*PATHS, "recipe=small_mine"], config_dir=tmp_path).optim.lr == 1e-3
    assert load_config("train", [*PATHS, "recipe=small_fusesft"], config_dir=tmp_path).optim.lr == 0.5
    with pytest.raises(UserError, match="recipe=small_fusesf: no such choice. Did you mean small_fusesft"):
        load_config("train", [*PATHS, "recipe=small_fusesf"])


def test_recipes_are_the_published_ones():
    sft, ln_dpo = (load_config("train", [*PATHS, f"recipe=llama31_8b_{name}"]) for name in ("fusesft", "fusepo_ln_dpo"))
    assert (sft.optim.lr, sft.trainer.max_epochs, sft.data.global_batch_size, sft.data.seq_length) == (
        5e-6,
        3,
        128,
        2048,
    )
    assert (sft.optim.sched.name, sft.optim.sched.warmup_ratio, sft.trainer.precision) == ("cosine", 0.1, "bf16")
    assert (ln_dpo.objective.beta, ln_dpo.optim.lr, ln_dpo.trainer.max_epochs) == (10.0, 8e-7, 1)


# --- what a person gets wrong ---


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optim.lrr=1", "optim.lr?"),
        ("model.tensor_parallel_size=2", "model.tensor_model_parallel_size?"),
        ("max_steps=2", "trainer.max_steps?"),
        ("+trainer.max_step=2", "trainer.max_steps?"),
        ("optim.sched.warmup=2", "optim.sched.warmup_steps?"),
        ("trainer={max_stepz: 3}", "trainer.max_steps?"),
        ("objektive=fusesft", "objective?"),
    ],
)
def test_unknown_key_names_the_nearest(override, nearest):
    message = error_of("train", *PATHS, override)
    assert "no such key" in message and message.endswith(f"Did you mean {nearest}")


def test_unknown_key_in_a_file_is_named_with_its_full_path(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\ndata: {path: /d, packing: {share_prefx: auto}}\n")
    message = error_of("train", "model.path=/m", config_dir=tmp_path, config_name="mine")
    assert message == "data.packing.share_prefx: no such key. Did you mean data.packing.share_prefix?"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=fast", "optim.lr=fast: must be a number, such as optim.lr=5e-06."),
        ("optim.lr=true", "optim.lr=true: must be a number, such as optim.lr=5e-06."),
        ("optim.lr=nan", "optim.lr=nan: must be a number, such as optim.lr=5e-06."),
        ("optim.lr=null", "optim.lr=null: must be a number, such as optim.lr=5e-06."),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5: must be a whole number, such as trainer.max_steps=1."),
        ("data.shuffle=1", "data.shuffle=1: must be true or false, such as data.shuffle=true."),
        ("run.name=7", "run.name=7: must be text, such as run.name=fuserl."),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: must be a list of 2, such as optim.betas=[0.9,0.95]."),
        ("optim.betas=[0.9,a]", "optim.betas=a: must be a number, such as optim.betas=0.1."),
        ("trainer.precision=bf17", "trainer.precision=bf17: not one of 32, bf16, fp8_delayed, "),
        ("optim.sched=cosine", "optim.sched=cosine: optim.sched is a section; set one of its keys: optim.sched.name, "),
        ("model=llama31_8", "model=llama31_8: no such choice. Did you mean llama31_8b? There are: llama31_8b, "),
        ("model=null", "model=null: no such choice. There are: llama31_8b, "),
        ("run.seed=1,2", "'run.seed=1,2': one run takes one value"),
        ("~optim.lr", "'~optim.lr': keys are set, never removed"),
        ("optim.lr", "'optim.lr' is not an override"),
        ("run.name=a=b", "'run.name=a=b' is not an override"),
        ("run.name=${nowhere}", "Interpolation key 'nowhere' not found"),
    ],
)
def test_wrong_values_name_field_value_and_what_works(override, expected):
    assert error_of("train", *PATHS, override).startswith(expected)


def test_required_fields_say_what_to_type():
    assert error_of("train") == "model.path: required and not set; type model.path=/models/Llama-3.1-8B-Instruct."
    assert error_of("train", "model.path=/m").startswith("data.path: required and not set; type data.path=")
    assert error_of("build", *BUILD[:3]).startswith(
        "reward_temperature: required and not set; type reward_temperature=auto reward_accuracy=0.75"
    )


def test_auto_is_a_temperature_of_a_build_alone():
    assert load_config("build", [*BUILD[:3], "reward_temperature=auto"]).reward_temperature == "auto"
    assert error_of("build", *BUILD, "reward_temperature=atuo").startswith(
        "reward_temperature=atuo: must be a number or auto"
    )
    assert error_of("build", *BUILD, "reward_temperature=null").startswith("reward_temperature=null: must be a number")
    line = error_of("train", *PATHS, "data.reward_temperature=auto")
    assert line.startswith("data.reward_temperature=auto: auto is worked out by `fuserl build`; null takes")


def test_missing_files(tmp_path):
    assert error_of("train", config_name="trian").endswith("Did you mean train?")
    assert "no such directory" in error_of("train", config_dir=tmp_path / "none")
    assert "no such file" in error_of("train", config_name="none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    assert "bad.yaml" in error_of("train", config_dir=tmp_path, config_name="bad")
    (tmp_path / "lost.yaml").write_text("defaults: [train, {override model: lost}]\n")
    assert "lost" in error_of("train", config_dir=tmp_path, config_name="lost")


def test_a_credential_does_not_reach_the_saved_config(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hush-hush-1234")
    message = error_of("train", *PATHS, "run.name='x ${oc.env:SOME_TOKEN}'")
    assert message.startswith("run.name: holds the value of $SOME_TOKEN") and "hush" not in message


def test_every_key_can_be_set_on_the_command_line():
    """Whether or not a yaml file mentions it: the default of every leaf is accepted back."""

    def leaves(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    expected = load_config("train", PATHS)
    words = {None: "null", True: "true", False: "false"}
    overrides = []
    for key, value in leaves(dataclasses.asdict(expected)):
        text = (
            words[value]
            if value is None or isinstance(value, bool)
            else list(value)
            if isinstance(value, tuple)
            else value
        )
        overrides.append(f"{key}={text}")
    assert len(overrides) > 40
    assert load_config("train", overrides) == expected


@pytest.mark.parametrize("schema", [Config, BuildConfig])
def test_every_field_has_a_type_that_is_checked(schema):
    def types(section):
        for field in dataclasses.fields(section):
            yield from types(field.type) if dataclasses.is_dataclass(field.type) else [plain_type(field)]

    plain = {int, float, bool, str, type(None)}
    for kind in types(schema):
        if typing.get_origin(kind) is dict:  # names and values of the user's own; the next test
            continue
        members = typing.get_args(kind) if typing.get_origin(kind) is not typing.Literal else [str]
        for member in members or [kind]:
            assert member in plain or member is Ellipsis or typing.get_origin(member) is typing.Literal, kind
    assert len(all_keys(schema)) > 10


def test_names_of_the_users_own_as_a_whole_and_one_by_one():
    base = ["inputs=[a.jsonl]", "output=o", "tokenizer=t", "reward_temperature=1"]
    for given in (["chat_template_kwargs={enable_thinking:false}"], ["chat_template_kwargs.enable_thinking=false"]):
        assert load_config("build", [*base, *given]).chat_template_kwargs == {"enable_thinking": False}
    assert load_config("build", base).chat_template_kwargs == {}
    with pytest.raises(UserError, match="chat_template_kwargs=5: must be names with values"):
        load_config("build", [*base, "chat_template_kwargs=5"])
    with pytest.raises(UserError, match="chat_template_kwarg.x: no such key"):
        load_config("build", [*base, "chat_template_kwarg.x=5"])
    with pytest.raises(UserError, match="chat_template_kwargs.tools: the data set gives the template this one"):
        validate_build(load_config("build", [*base, "chat_template_kwargs.tools=5"]))


@pytest.mark.parametrize("text", ["run: &a {name: *a}\n", "run: " + "[" * 600 + "]" * 600 + "\n"])
def test_a_yaml_file_without_a_bottom_is_one_line(tmp_path, text):
    (tmp_path / "deep.yaml").write_text(text)
    assert error_of("train", config_name=str(tmp_path / "deep.yaml")).endswith("or an anchor that holds itself.")


def test_a_number_of_thousands_of_digits_is_one_line():
    message = error_of("train", "trainer.max_steps=" + "1" * 5000)
    assert "is not an override" in message and len(message) < 1000 and "\n" not in message
