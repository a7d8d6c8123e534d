"""examples/noisy: its worlds, one tiny cell of each of its two students, and the checks of its table."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "noisy"
sys.path[:0] = [str(EXAMPLE), str(EXAMPLE.parent / "skills")]
import learned  # noqa: E402
import methods  # noqa: E402
import student  # noqa: E402
import table  # noqa: E402
import world  # noqa: E402

NOISY = world.WORLDS["noisy"]


def test_a_world_is_as_it_says_and_the_same_each_time():
    tasks = world.make_prompts("test", 40)
    records = world.responses(NOISY, 5, "x", tasks)
    assert records == world.responses(NOISY, 5, "x", tasks) != world.responses(NOISY, 6, "x", tasks)
    assert len(records) == 240 * 16
    # careless answers are right by luck at some prompts: the others count
    plain = [t.prompt for t in tasks if world.careless_answer(t.prompt) != t.answer]
    of = [(r["prompt"], r["response"]) for r in records if r["prompt"] in plain]
    for share, judge in ((NOISY.right, world.is_right), (NOISY.habit, world.is_careless)):
        assert sum(judge(*pair) for pair in of) / len(of) == pytest.approx(share, abs=0.03)
    errors = torch.tensor([r["reward"] - world.quality(r["prompt"], r["response"]) for r in records])
    assert float(errors.mean()) == pytest.approx(0, abs=0.06) and float(errors.std()) == pytest.approx(1.2, abs=0.05)
    # the error belongs to the text, not to the order
    one = records[17]
    assert one["reward"] == world.noisy_reward(NOISY, 5, one["prompt"], one["response"])


def test_shuffled_rewards_know_nothing_and_lose_nothing():
    tasks = world.make_prompts("test", 40)
    records = world.responses(replace(NOISY, noise=0.02), 5, "x", tasks)
    shuffled = world.with_shuffled_rewards(records, 5)
    kept = {(r["prompt"], r["source"], r["response"], r["reward"]) for r in records}
    assert Counter((r["prompt"], r["reward"]) for r in shuffled) == Counter((p, reward) for p, _, _, reward in kept)
    quality = torch.tensor([world.quality(r["prompt"], r["response"]) for r in shuffled])
    places = {task.prompt: i for i, task in enumerate(tasks)}
    ids = torch.tensor([places[r["prompt"]] for r in shuffled])
    for rewarded, low, high in ((records, 0.95, 1.0), (shuffled, -0.1, 0.1)):
        of = {(r["prompt"], r["source"], r["response"]): r["reward"] for r in rewarded}
        rewards = torch.tensor([of[r["prompt"], r["source"], r["response"]] for r in shuffled])
        # some prompts are easier than others: of deviations from each prompt's mean
        one, other = (_centred(v, ids) for v in (quality, rewards))
        assert low <= float((one * other).sum() / (one.norm() * other.norm())) <= high


def _centred(values, ids):
    sums = torch.zeros(int(ids.max()) + 1).index_add(0, ids, values)
    counts = torch.zeros_like(sums).index_add(0, ids, torch.ones_like(values))
    return values - (sums / counts)[ids]


@pytest.fixture
def one_thread():
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(default)


def test_a_cell_of_the_phase_diagram(one_thread):
    found = student.compare(student.Task(0.25, 0.6, 1.0, 4, seeds=(1, 2, 3, 4)))
    exact = student.Task(0.25, 0.6, 0.0, 4, seeds=(1, 2))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    assert means["target"] + 5 < means["FuseSFT"] < means["FuseSFT + more FuseSFT"] < means[table.FUSERL]
    assert exact.accuracy == 1.0 and exact.tau == 0.0  # the rule takes the best source


def test_a_learned_reward_errs_the_same_way_on_the_same_answer(one_thread, monkeypatch):
    monkeypatch.setattr(learned, "ENSEMBLE", 1)
    task = student.Task(0.25, 0.6, 0.0, 4, seeds=(1, 2))
    models = learned.reward_models(task, 400, seeds=(1, 2))
    rewards = learned.rewards_of(models, task)
    assert rewards.shape == (1, *task.answers_TGKN.shape)
    task.use(rewards.mean(0))
    assert 0.55 < task.accuracy < 0.8
    same = task.answers_TGKN[..., :1] == task.answers_TGKN[..., 1:]
    assert bool((rewards[0][..., :1] == rewards[0][..., 1:])[same].all())


def test_the_kept_results_are_what_their_labels_say_and_swapped_labels_are_caught():
    lines, tries = table.read(methods.RESULTS / "results.jsonl"), methods.read_tries()
    assert table.problems(lines, tries) == []
    seed = [line for line in lines if (line["world"], line["seed"]) == ("noisy", methods.SEEDS[0])]
    names = [line["method"] for line in seed]
    assert sorted(names) == sorted(["target", *methods.METHODS])
    for i in range(1, len(seed)):
        for j in range(i):
            swapped = [dict(line) for line in seed]
            swapped[i]["method"], swapped[j]["method"] = names[j], names[i]
            assert table.problems(swapped, tries), (names[i], names[j])
    better = json.loads(json.dumps(seed))
    better[3]["accuracy"] += 1
    assert any("marks" in problem for problem in table.problems(better, tries))


def test_every_method_had_the_same_number_of_tries_and_took_its_best():
    tries = methods.read_tries()
    for name, method in methods.METHODS.items():
        assert len(method.tries) in (0, methods.BUDGET) and bool(method.tries) != bool(method.rates_of)
        if method.tries:
            values = [tries[name, rates] for rates in method.tries]
            assert tries[name, methods.chosen(name, tries)] == max(values)
    assert not set(methods.SEEDS) & {*range(1, 7), *range(11, 17), 101, methods.DEVELOPMENT_SEED}


@pytest.mark.slow  # the trainer's imports
def test_a_tiny_cell_by_the_trainer(tmp_path, monkeypatch):
    import runs

    monkeypatch.setattr(runs, "PER_SKILL", {"sft": 1, "po": 1})
    monkeypatch.setattr(runs, "reward_accuracy", lambda world: 0.6)
    monkeypatch.setattr(runs, "settings_of", lambda name, rates: [*methods.METHODS[name].settings[:1], *rates.split()])
    tries = {(name, rates): 0.0 for name, method in methods.METHODS.items() for rates in method.tries}
    seed = runs.Seed(tmp_path, "noisy", 7, tries, runs.HELD_OUT["test"][:8])
    line = seed.result("FuseSFT")
    assert line["start"] != line["model"] and line["rates"] == methods.SFT_RATES[0]
    again = runs.Seed(tmp_path, "noisy", 7, tries, runs.HELD_OUT["test"][:8])
    assert again.result("FuseSFT") == line == json.loads(seed.file.read_text())
