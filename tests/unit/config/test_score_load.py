"""Settings of `fuserl score`: every shipped reward loads, and a mistake is one line with what would work."""

from pathlib import Path

import pytest
import yaml

from fuserl_megatron.config.compose import conf_dir
from fuserl_megatron.config.score_load import load_score
from fuserl_megatron.util.errors import UserError

RUN = ["samples=[a.jsonl]", "output=out"]


def test_shipped_rules_are_there():  # tests/unit/config/test_config_load.py loads every file
    from fuserl_megatron.making import builtin_rules

    values = [yaml.safe_load(file.read_text()) for file in (conf_dir() / "reward").glob("*.yaml")]
    names = [value["function"].partition(":")[::2] for value in values if value["kind"] == "rule"]
    assert len(names) > 5 and {module for module, _ in names} == {builtin_rules.__name__}
    assert all(callable(getattr(builtin_rules, name)) for _, name in names)


def test_settings_of_the_run_of_one_reward_and_of_ones_own(tmp_path):
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward/short.yaml").write_text("kind: rule\nfunction: mine:short\narguments: {words: 5}\n")
    words = [
        *RUN,
        "rewards=[short,armorm,own]",
        "rewards.armorm.batch_tokens=99",
        "rewards.armorm.model=/models/armorm",
    ]
    words += ["rewards.armorm.model=/models/armorm", "rewards.own.kind=rule", "rewards.own.function=mine:own"]
    words += ["rewards.own.arguments.a.b=[1,2]"]
    words += ["combine.weights={armorm: 2, armorm.helpsteer-verbosity: -0.5}", "combine.weights.short=0.1"]
    config, rewards = load_score(words, tmp_path)
    assert rewards["short"].arguments == {"words": 5} and rewards["own"].arguments == {"a": {"b": [1, 2]}}
    assert (rewards["armorm"].batch_tokens, rewards["armorm"].head) == (99, "armorm")
    assert rewards["armorm"].model == "/models/armorm"
    assert config.combine.weights == {"armorm": 2, "armorm.helpsteer-verbosity": -0.5, "short": 0.1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rewards=[]"], "rewards=[]: by what?"),
        (["rewards=[armrm]"], "Did you mean armorm?"),
        (["rewards=[length,length]"], "one stands twice"),
        (["rewards=[../x]"], "letters, digits"),
        (["rewards=[length]", "rewards.lenght.workers=1"], "rewards.lenght: not one of rewards=[length]. Did you mean"),
        (["rewards=[length]", "rewards.length.wrkers=1"], "rewards.length: wrkers: no such key. Did you mean workers?"),
        (["rewards=[length]", "rewards.length.time_limit=0"], "rewards.length.time_limit=0.0: must be positive"),
        (["rewards=[length]", "rewards.length.network=maybe"], "rewards.length: network=maybe: not one of off, on"),
        (["rewards=[own]", "rewards.own.kind=rul"], "rewards.own.kind=rul: not one of model, endpoint, rule. Did you"),
        (["rewards=[own]", "rewards.own.kind=rule"], "rewards.own: function: required"),
        (["rewards=[own]", "rewards.own.kind=rule", "rewards.own.function=f"], "is written package.module:function"),
        (["rewards=[endpoint]"], "rewards.endpoint.url=[]: needs the server's address"),
        (["rewards=[endpoint]", "rewards.endpoint.api=score"], "scores pairs of texts"),
        (["rewards=[length]", "combine.weights={lenth: 1}"], "combine.weights.lenth: not one of rewards=[length]. Did"),
        (["rewards=[length]", "combine.weights={length: much}"], "combine.weights.length=much: must be a number"),
        (["rewards=[length]", "combine.method=product", "combine.standardize=prompt"], "has no meaning"),
        (["rewards=[length]", "combine.methd=sum"], "Did you mean combine.method?"),
        (["rewards=[length]", "policy.truncated=remove"], "not one of auto, keep, drop, penalty"),
        (
            ["rewards=[length]", "rescore=[lenght]"],
            "rescore=[lenght]: not one of rewards=[length]. Did you mean",
        ),
        (["rewards=[length]", "heldout_ngram=0"], "must be at least 1"),
        (["rewards=[length]", "samples=[]"], "samples=[]: what shall be scored?"),
    ],
)
def test_mistakes_are_one_line(words, said):
    with pytest.raises(UserError) as raised:
        load_score([*RUN, *words])
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_key_is_no_setting(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "abc-123-very-secret")
    words = [
        *RUN,
        "rewards=[endpoint]",
        "rewards.endpoint.url=[http://x]",
        "rewards.endpoint.model=abc-123-very-secret",
    ]
    with pytest.raises(UserError, match="rewards.endpoint: model: holds the value of .MY_API_KEY"):
        load_score(words)


def test_only_output_for_status():
    assert load_score(["output=x"], only_output=True)[0].output == "x"
    assert not Path("x").exists()
