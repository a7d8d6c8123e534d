"""`reward_temperature=auto` from the command line: every way to the accuracy, what is kept, what goes wrong."""

import dataclasses
import gzip
import math
import random

import pytest

from fuserl_megatron.cli import main
from fuserl_megatron.config.schema import Config, ObjectiveConfig
from fuserl_megatron.data.dataset import FusedDataset
from fuserl_megatron.data.pairs import prepare
from fuserl_megatron.train.resume import run_identity
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.files import file_sha256

SCORES = {"w1": (0.18, 0.165, 0.172, 0.151), "w2": (0.2, 0.24), "w9": (0.5,)}
DEVIATION = math.sqrt((0.000454 / 3 + 0.0008) / 2)  # variances of the first two prompts; the third has none


@pytest.fixture
def records(make_record):
    return [
        make_record(prompt=p, source=s, response=f"w3 w{i}", reward=r, meta=0, other=(i % 3) + 10 * r)
        for p, scores in SCORES.items()
        for i, (s, r) in enumerate(zip("abcd", scores, strict=False))
    ]


@pytest.fixture
def build(tmp_path, tokenizers_dir, write_records, records, capsys):
    """build(*settings) -> (exit code, standard output, standard error)."""

    def run(*settings, of=records):
        places = [f"inputs=[{write_records(of)}]", f"output={tmp_path / 'fused'}", "force=true"]
        code = main(["build", *places, f"tokenizer={tokenizers_dir['words']}", *settings])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(build, tmp_path):
    """refused(*settings) -> the one line; nothing is left over."""

    def run(*settings, **of):
        before = sorted(path.name for path in tmp_path.iterdir())
        code, out, err = build("reward_temperature=auto", *settings, **of)
        after = {path.name for path in tmp_path.iterdir()}
        assert (code, out, err.count("\n")) == (2, "", 1) and after <= {*before, "in.jsonl"}
        return err.removeprefix("fuserl: error: ").rstrip("\n")

    return run


def pairs(*numbers):
    return [{"prompt": "p", "chosen_reward": a, "rejected_reward": b} for a, b in numbers]


def test_a_given_accuracy(build, tmp_path):
    code, out, err = build("reward_temperature=auto", "reward_accuracy=0.75")
    assert (code, err) == (0, "")
    manifest = FusedDataset(tmp_path / "fused").manifest
    assert manifest.reward_temperature == pytest.approx(0.83 * DEVIATION, abs=1e-12)
    rule = {"score_deviation": pytest.approx(DEVIATION, abs=1e-12), "accuracy": 0.75}
    assert manifest.temperature_rule == rule | {"accuracy_from": "reward_accuracy"}
    assert "reward_temperature 0.0181 by the rule (auto): scores deviate by 0.02181 within a prompt, the reward" in out
    assert "'s accuracy is 0.750 (as given)\n" in out
    by_auto = manifest.effective_number_of_sources, manifest.per_source, manifest.hash
    assert build(f"reward_temperature={manifest.reward_temperature!r}")[0] == 0
    given = FusedDataset(tmp_path / "fused").manifest
    assert given.temperature_rule is None and given.reward_temperature == manifest.reward_temperature
    assert by_auto == (given.effective_number_of_sources, given.per_source, given.hash), "the same data set and weights"


def test_training_sees_the_number(build, tmp_path):
    """Also in what a resumed run compares: a data set built with auto and one with that number are the same run."""
    build("reward_temperature=auto", "reward_accuracy=0.75")
    dataset = FusedDataset(tmp_path / "fused")
    tau = dataset.manifest.reward_temperature
    assert prepare(dataset, ObjectiveConfig()).reward_temperature == tau
    (tmp_path / "config.json").write_text("{}")
    config = Config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(tmp_path)))
    assert run_identity(config, dataset, tau, 3)["reward_temperature"] == str(tau)
    assert prepare(dataset, ObjectiveConfig(), 0.5).reward_temperature == 0.5


def test_an_exact_reward_takes_the_best_source_alone(build, tmp_path):
    build("reward_temperature=auto", "reward_accuracy=1")
    dataset = FusedDataset(tmp_path / "fused")
    prepared = prepare(dataset, ObjectiveConfig())
    assert prepared.reward_temperature == 0.0 and prepared.weights.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_labelled_pairs(build, write_records, tmp_path, name):
    """70 right, 10 ties, 20 wrong: accuracy 0.75 with Wilson's interval."""
    of = pairs(*[(2, 1)] * 70, *[(1, 1)] * 10, *[(-1e3, 0.5)] * 20)
    path = write_records(["", *of], "pairs.jsonl")
    if name.endswith(".gz"):
        path = str(tmp_path / name)
        with gzip.open(path, "wb") as file:
            file.write((tmp_path / "pairs.jsonl").read_bytes())
    code, out, _ = build("reward_temperature=auto", f"calibration={path}")
    manifest = FusedDataset(tmp_path / "fused").manifest
    assert code == 0 and manifest.reward_temperature == pytest.approx(0.83 * DEVIATION, abs=1e-12)
    interval = [pytest.approx(0.6569, abs=1e-4), pytest.approx(0.8245, abs=1e-4)]
    rule = manifest.temperature_rule
    assert rule["accuracy"] == 0.75 and rule["accuracy_interval"] == interval and rule["accuracy_from"] == "calibration"
    assert (rule["pairs"], rule["ties"]) == (100, 10) and rule["file"] == {"name": path, "sha256": file_sha256(path)}
    assert (
        "0.750 (on 100 labelled pairs, 10 ties; 95 % interval 0.657 to 0.825, which is reward_temperature 0.0111" in out
    )


def test_an_interval_that_reaches_a_coin_s_half_says_so(build, write_records):
    path = write_records(pairs((2, 1), (2, 1), (1, 2)), "pairs.jsonl")
    code, out, _ = build("reward_temperature=auto", f"calibration={path}")
    assert code == 0 and "which is reward_temperature 0.003" in out and " to inf)" in out


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{"], "pairs.jsonl:2: not valid JSON"),
        (
            ['{"chosen_reward": 1}'],
            "pairs.jsonl:2: field 'rejected_reward' is missing: a record needs chosen_reward, rej",
        ),
        (['{"chosen_reward": "1", "rejected_reward": 0}'], "pairs.jsonl:2: field 'chosen_reward' must be a number"),
        (['{"chosen_reward": true, "rejected_reward": 0}'], "pairs.jsonl:2: field 'chosen_reward' must be a number"),
        (
            ['{"chosen_reward": NaN, "rejected_reward": 0}'],
            "pairs.jsonl:2: field 'chosen_reward' is nan: it must be a fin",
        ),
        (['{"chosen_reward": 1, "chosen_reward": 2}'], "pairs.jsonl:2: not valid JSON ('chosen_reward' stands twice"),
        (["[1]"], "pairs.jsonl:2: a record must be a JSON object"),
        (
            pairs((1, 2), (1, 2)),
            "the chosen answer has the higher reward in 1 of 3 pairs and the same in 0, so the reward",
        ),
        (pairs((1, 2)), "so the reward tells nothing about which answer is better: set reward_temperature=inf"),
    ],
)
def test_bad_pairs_are_one_line(refused, write_records, lines, says):
    path = write_records([*pairs((2, 1)), *lines], "pairs.jsonl")
    assert says in refused(f"calibration={path}", "on_bad_record=skip")


def test_no_pairs_are_one_line(refused, write_records, tmp_path):
    assert "holds no pair: each line needs chosen_reward" in refused(f"calibration={write_records([], 'no.jsonl')}")
    (tmp_path / "pairs.csv").write_text("1,2\n")
    assert "pairs.csv is not .jsonl or .jsonl.gz" in refused(f"calibration={tmp_path / 'pairs.csv'}")
    for name in ("none.jsonl", "."):
        assert "does not exist, or is no file" in refused(f"calibration={tmp_path / name}")


def noisy(make_record, seed, num_prompts, noise_of_other=1.0):
    """Records of three sources whose two rewards have quality in common; here and there one is missing."""
    rng = random.Random(seed)
    for prompt in range(num_prompts):
        for source in "abc":
            quality = rng.gauss(0, 1)
            reward, other = quality + rng.gauss(0, 1), -7 + 20 * (quality + noise_of_other * rng.gauss(0, 1))
            if rng.random() < 0.9:
                text = f"w{prompt % 100} w{prompt // 100}"
                yield make_record(prompt=text, source=source, response=f"w{prompt % 7}", reward=reward, other=other)


def test_two_reward_models(build, make_record, tmp_path):
    """Quality is half of either's variance: correlation 0.5, accuracy 0.75."""
    code, out, _ = build("reward_temperature=auto", "second_reward=other", of=[*noisy(make_record, 1, 800)])
    assert code == 0 and "ignored" not in out
    manifest = FusedDataset(tmp_path / "fused").manifest
    rule = manifest.temperature_rule
    low, high = rule["accuracy_interval"]
    assert rule["field"] == "other" and rule["accuracy_from"] == "second_reward" and low < 0.75 < high < low + 0.04
    assert rule["correlation"] == pytest.approx(0.5, abs=0.06) and rule["score_deviation"] == pytest.approx(
        2**0.5, rel=0.05
    )
    assert manifest.reward_temperature == pytest.approx(0.83 * 2**0.5, rel=0.15)
    assert f"correlation {rule['correlation']:.3f} with other; 95 % interval" in out


def test_a_second_reward_belongs_to_its_response(build, make_record, tmp_path):
    """Also where records are out of order, twice there, left out at tokenising, or of another file."""
    of = [*noisy(make_record, 2, 60)]
    build("reward_temperature=auto", "second_reward=other", of=of)
    before = FusedDataset(tmp_path / "fused").manifest.temperature_rule
    random.Random(0).shuffle(of)
    long = make_record(prompt="w1 " * 30, source="a", response="w1", reward=1e6, other=-1e6)
    code, out, _ = build(
        "reward_temperature=auto", "second_reward=other", "max_length=12", "on_bad_record=skip", of=[long, *of, of[3]]
    )
    after = FusedDataset(tmp_path / "fused").manifest
    assert code == 0 and after.counts["duplicate_records"] == 1 and after.rejected == {"prompt_too_long": 1}
    for name in ("correlation", "score_deviation", "accuracy"):
        assert after.temperature_rule[name] == pytest.approx(before[name], rel=1e-12)


def test_second_rewards_that_cannot_be(refused, records, make_record):
    assert refused("second_reward=reward").startswith("second_reward=reward: that field means something else")
    assert "in.jsonl:1: field 'third' is missing: a record needs prompt, source, response, reward, third" in refused(
        "second_reward=third"
    )
    wrong = records[0] | {"other": "high"}
    assert "in.jsonl:8: field 'other' must be a number" in refused("second_reward=other", of=[*records, wrong])
    twice = records[0] | {"other": 99}
    line = refused("second_reward=other", of=[*records, twice])
    assert "in.jsonl:8: other 99.0 for the same prompt, source and response as" in line
    level = [record | {"other": 1} for record in records]
    assert "by it the sources' scores are equal in every prompt" in refused("second_reward=other", of=level)
    against = [record | {"other": -record["reward"]} for record in records]
    line = refused("second_reward=other", of=against)
    assert "its scores correlate by -1.000 with the reward's, so at least one of them tells nothing" in line


def test_nothing_to_go_by(refused, make_record):
    single = [make_record(prompt=f"w{i}", source="ab"[i % 2], reward=i) for i in range(4)]
    assert "auto: no prompt has two sources, nothing to go by" in refused("reward_accuracy=0.8", of=single)
    equal = [make_record(source=s) for s in "ab"]
    assert "auto: the sources' scores are equal in every prompt" in refused("reward_accuracy=0.8", of=equal)


@pytest.mark.parametrize(
    ("settings", "gap"),
    [
        (["score_aggregation=max"], 0.4),
        (["score_aggregation=mean"], 0.5),
        (["reward_standardization=dataset"], 0.4 / math.sqrt(0.0875)),
    ],
)
def test_the_deviation_is_that_of_the_scores_that_are_used(build, make_record, tmp_path, settings, gap):
    """Rewards (0, 0.4) and (0.6, 0.8), of variance 0.0875: the best differ by 0.4, the means by 0.5."""
    rewards = {"a": (0.0, 0.4), "b": (0.6, 0.8)}
    of = [make_record(source=s, response=f"w{i}", reward=r) for s, rs in rewards.items() for i, r in enumerate(rs)]
    build("reward_temperature=auto", "reward_accuracy=0.75", *settings, of=of)
    found = FusedDataset(tmp_path / "fused").manifest.temperature_rule["score_deviation"]
    assert found == pytest.approx(gap / math.sqrt(2), abs=1e-12)


def test_without_a_temperature_the_rule_is_shown_on_these_data(build, make_record):
    code, out, err = build()
    assert (
        code == 2 and err.count("\n") == 1 and "type reward_temperature=auto with reward_accuracy=A, or a number" in err
    )
    title, head, *rows = out.splitlines()
    assert title == (
        "reward_temperature=auto on these data, where scores deviate by 0.02181 within a prompt (of 4 sources):"
    )
    assert head.split("  ")[1:] == ["reward_accuracy", "reward_temperature", "effective number of sources"]
    table = [[float(cell) for cell in row.split()] for row in rows]
    for (_, tau, number), at_1 in zip(table, (1.6290, 0.83, 0.2697), strict=True):
        assert tau == pytest.approx(at_1 * DEVIATION, rel=1e-3) and 1 < number < 4
    assert [row[0] for row in table] == [0.65, 0.75, 0.9] and table[0][2] > table[1][2] > table[2][2]
    code, out, err = build(of=[make_record()])
    assert (code, out) == (2, "") and "type reward_temperature=1 (no prompt has two sources whose scores differ" in err


def test_library_users_get_the_table_with_the_error(build_dataset, records):
    with pytest.raises(UserError) as error:
        build_dataset(records, reward_temperature=math.nan)
    assert len(error.value.table) == 5 and "\n" not in str(error.value)
