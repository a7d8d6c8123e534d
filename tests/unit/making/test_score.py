"""`fuserl score` as a whole: exactly once, nothing scored twice, joined as asked, read by `fuserl build`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from making_helpers import write_records

from fuserl_megatron.cli.app import main
from fuserl_megatron.config.load import from_dict
from fuserl_megatron.config.score_sections import KINDS, ScoreConfig
from fuserl_megatron.making import score as scoring
from fuserl_megatron.making.accounting import Account, Plan
from fuserl_megatron.making.finished import finished_rows
from fuserl_megatron.making.parts import key_array, key_of, scan
from fuserl_megatron.records.grouping import load_groups
from fuserl_megatron.records.records import Rejects
from fuserl_megatron.util.errors import UserError

RULE = """
import time

def counted(prompt, response, record, pause=0.0, fail=()):
    with open("calls.txt", "a") as file:
        file.write(repr(response) + "\\n")
    time.sleep(pause)
    if response in fail:
        raise ValueError("bad " + response)
    return {"reward": float(len(response)), "vowels": sum(c in "aeiou" for c in response)}

def broken(prompt, response, record):
    raise RuntimeError(f"never works: {len(response)}")
"""
ANSWERS = [("p1", "a", "one"), ("p1", "a", "three"), ("p1", "b", "five"), ("p2", "a", "eleven"), ("p2", "b", "by")]
RECORDS = [{"prompt": p, "source": s, "response": r} for p, s, r in ANSWERS]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "my_rule.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    write_records(Path("answers.jsonl"), RECORDS)


def settings(words):
    """As `load_score`, without hydra's tenth of a second a file (test_command_line goes that way)."""
    of_run, of_rewards = {}, {}
    for word in words:
        key, _, value = word.partition("=")
        tree, parts = of_run, key.split(".")
        if parts[0] == "rewards" and len(parts) > 1:
            tree, parts = of_rewards, parts[1:]
        for part in parts[:-1]:
            tree = tree.setdefault(part, {})
        tree[parts[-1]] = yaml.safe_load(value.replace(":", ": ") if value.startswith("{") else value)
    config = from_dict(ScoreConfig, of_run)
    of_rewards.setdefault("length", {"kind": "rule", "function": "fuserl_megatron.making.builtin_rules:length"})
    return config, {name: from_dict(KINDS[of_rewards[name]["kind"]], of_rewards[name]) for name in config.rewards}


def run(*words, rewards="[counted]", samples="[answers.jsonl]", say=None):
    """One `fuserl score` in this process; the reward `counted` is always known."""
    names = rewards.strip("[]").split(",")
    own = ["rewards.counted.kind=rule", "rewards.counted.function=my_rule:counted", "rewards.counted.workers=1"]
    words = [*(own if "counted" in names else []), f"samples={samples}", "output=scored", f"rewards={rewards}", *words]
    config, typed = settings(words)
    return scoring.score(config, typed, progress=False, say=say or (lambda line: None))


def calls():
    return Path("calls.txt").read_text().splitlines() if Path("calls.txt").exists() else []


def records():
    return [json.loads(line) for line in Path("scored/records.jsonl").read_text().splitlines()]


def rewards():
    return {record["response"]: record["reward"] for record in records()}


def test_values_records_and_lineage():
    report = run()
    assert [r["response"] for r in records()] == [r["response"] for r in RECORDS]
    assert records()[0] == RECORDS[0] | {"reward": 3.0, "rewards": {"counted": 3.0}, "key": records()[0]["key"]}
    assert sorted(calls()) == sorted(repr(r["response"]) for r in RECORDS)
    assert report["records"] == 5 and report["left_out"] == {}
    lineage = report["rewards"]["counted"]["lineage"]
    assert len(lineage["settings"]["found"]["code_sha256"]) == 64
    rows = list(finished_rows(Path("scored/rewards/counted")))
    assert [row["parts"]["vowels"] for row in rows] == [2, 2, 2, 3, 0]


def test_other_weights_and_policies_score_nothing_again():
    run()
    first = calls()
    run("combine.weights={counted: 2}")
    assert rewards()["three"] == 10
    run("combine.weights={counted.vowels: 0.5}")
    assert rewards()["eleven"] == 6 + 0.5 * 3
    run("combine.standardize=prompt")
    assert rewards()["eleven"] == -rewards()["by"] == pytest.approx(1)
    run("combine.standardize=dataset")
    assert sum(rewards().values()) == pytest.approx(0)
    run("policy.refused=penalty", "policy.refused_penalty=2", "policy.refusal_phrases=[ele]")
    assert rewards()["eleven"] == 4
    said = []
    run("policy.refused=penalty", "policy.refused_penalty=2", "policy.refusal_phrases=[ele]", say=said.append)
    assert calls() == first and "complete" in said[0]
    with pytest.raises(UserError, match="reward counted has no such part"):
        run("combine.weights={counted.vowls: 0.5}")


def test_another_reward_is_scored_alone_and_rewards_are_combined():
    run()
    first = calls()
    run("combine.weights={length: 10}", rewards="[counted,length]")
    assert calls() == first
    assert rewards()["five"] == pytest.approx(4 - 0.1)
    assert records()[2]["rewards"] == {"counted": 4, "length": -0.01}
    with pytest.raises(UserError, match="product needs values >= 0"):
        run("combine.method=product", rewards="[counted,length]")
    run("combine.method=product", "combine.weights={counted: 2}")
    assert rewards()["five"] == 16


def test_more_answers_score_what_is_missing():
    run()
    write_records(Path("more.jsonl"), [{"prompt": "p0", "source": "b", "response": "new"}])
    run(samples="[more.jsonl,answers.jsonl]")
    assert calls()[5:] == ["'new'"] and [r["response"] for r in records()][:2] == ["new", "one"]
    run()
    assert len(records()) == 5 and len(calls()) == 6


def stop_after(monkeypatch, count, *words):
    """A run that ends when it has written so many rows."""
    append = Account.append

    def stopping(self, i, row):
        if self.have.sum() == count:
            raise KeyboardInterrupt
        append(self, i, row)

    with monkeypatch.context() as patch:
        patch.setattr(Account, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(*words)


def test_another_plan_is_refused_and_rescore_throws_away(monkeypatch):
    run()
    with pytest.raises(UserError, match=r"arguments.pause \S+ there, 0.001 here.*rescore=\[counted\]") as raised:
        run("rewards.counted.arguments.pause=0.001")
    assert "\n" not in str(raised.value)
    run("rewards.counted.workers=2")
    Path("my_rule.py").write_text(RULE + "# another version\n")
    with pytest.raises(UserError, match="code_sha256"):
        run()
    stop_after(monkeypatch, 3, "rescore=[counted]")
    assert not Path("scored/done.json").exists()
    run("rescore=[counted]")  # goes on
    assert len(calls()) == 5 + 4 + 2 and len(records()) == 5
    run("rescore=[counted]")
    assert len(calls()) == 5 + 4 + 2 + 5


def test_killed_runs_go_on_with_exactly_the_missing_rows():
    write_records(Path("answers.jsonl"), [{"prompt": "p", "source": "a", "response": f"r{i}"} for i in range(120)])
    words = ["rewards.counted.kind=rule", "rewards.counted.function=my_rule:counted", "rewards.counted.workers=2"]
    words += ["rewards.counted.arguments.pause=0.02", "samples=[answers.jsonl]", "output=scored", "rewards=[counted]"]
    part = Path("scored/rewards/counted/part-00000.jsonl")
    process = subprocess.Popen([sys.executable, "-m", "fuserl_megatron.cli", "score", *words])
    while not part.exists() or part.read_bytes().count(b"\n") < 10:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = part.read_bytes()
    assert 10 <= before.count(b"\n") < 120 and not Path("scored/done.json").exists()
    with open(part, "ab") as file:
        file.write(before.splitlines()[0][:30])  # a torn line
    said = []
    with pytest.raises(UserError, match="not finished; type the command of `fuserl score` again"):
        load_groups(["scored"], Rejects("stop"))
    run("rewards.counted.workers=2", "rewards.counted.arguments.pause=0.02", say=said.append)
    assert any("last line was not whole" in line for line in said)
    keys = scan(part.parent).keys
    assert len(keys) == len(set(keys.tolist())) == 120
    assert rewards() == {f"r{i}": len(f"r{i}") for i in range(120)}
    assert len(calls()) <= 120 + 2 + 2  # what was in the workers at the kill


def test_a_rule_that_never_works_stops_at_once_and_leaves_nothing():
    write_records(Path("answers.jsonl"), [{"prompt": "p", "source": "a", "response": "x" * i} for i in range(1, 50)])
    with pytest.raises(
        UserError, match="the first 20 answers have no value, all for one reason: RuntimeError: never works"
    ):
        run("rewards.counted.function=my_rule:broken")
    run()  # the corrected rule is no other plan, for no row was made
    assert len(records()) == 49


def test_failures_by_policy():
    fail = "rewards.counted.arguments.fail=[five]"
    report = run(fail)
    assert "five" not in rewards() and report["left_out"] == {"failed": 1}
    assert report["rewards"]["counted"]["errors"] == {"ValueError": 1}
    run(fail, "policy.failed=value", "policy.failed_value=-7")
    assert rewards()["five"] == -7 and records()[2]["rewards"] == {"counted": None}
    with pytest.raises(UserError, match="policy.failed=stop: 1 answers"):
        run(fail, "policy.failed=stop")
    assert len(calls()) == 5
    with pytest.raises(UserError, match="no answer has a value: ValueError: bad one"):
        run("rescore=[counted]", "rewards.counted.arguments.fail=[one,three,five,eleven,by]")


UNUSUAL = [
    {"prompt": "p1", "source": "a", "response": "whole"},
    {"prompt": "p1", "source": "a", "response": "whole", "meta": {"n": 2}},
    {"prompt": "p1", "source": "b", "response": "cut off", "finish_reason": "length"},
    {"prompt": "p1", "source": "b", "response": " \n"},
    {"prompt": "p2", "source": "b", "response": "I'm sorry, but I can't help with that."},
    {"prompt": "p2", "source": "b", "response": "cut too", "meta": {"finish_reason": "length"}},
    {"prompt": "p2", "source": "b", "response": "cut too", "meta": {"finish_reason": "length"}},
]


@pytest.mark.parametrize(
    ("words", "kept", "left_out"),
    [
        ([], 4, {"empty": 1, "duplicated": 1}),
        (["policy.truncated=drop"], 2, {"empty": 1, "truncated": 2, "duplicated": 1}),
        (["policy.refused=drop"], 3, {"empty": 1, "refused": 1, "duplicated": 1}),
        (["policy.duplicated=keep"], 5, {"empty": 1}),
    ],
)
def test_unusual_answers_by_policy(words, kept, left_out):
    write_records(Path("answers.jsonl"), UNUSUAL)
    report = run(*words)
    assert len(records()) == kept and report["left_out"] == left_out
    assert report["flags"] == {"cut": 2, "empty": 1, "refused": 1, "duplicate": 1, "heldout": 0}
    assert report["repeated_records"] == 1 and report["sources"]["b"]["cut"] == 0.5
    assert len(calls()) == kept  # what is left out is not scored


def test_penalties_and_stop():
    write_records(Path("answers.jsonl"), UNUSUAL)
    run("policy.truncated=penalty", "policy.truncated_penalty=3")
    assert rewards()["cut off"] == len("cut off") - 3 and rewards()["whole"] == 5
    with pytest.raises(UserError, match="policy.empty=stop: 1 answers are empty"):
        run("policy.empty=stop")
    write_records(Path("answers.jsonl"), UNUSUAL[2:4])
    with pytest.raises(UserError, match="every answer is left out by policy .empty 1, truncated 1"):
        run("policy.truncated=drop")


def test_models_drop_cut_answers_and_are_not_loaded_to_join(reward_model_dir):
    write_records(Path("answers.jsonl"), UNUSUAL)
    shutil.copytree(reward_model_dir, "rm")
    words = ["rewards.rm.kind=model", "rewards.rm.model=rm"]
    report = run(*words, rewards="[rm]")
    assert report["left_out"] == {"empty": 1, "truncated": 2, "duplicated": 1} and len(records()) == 2
    before = rewards()
    shutil.rmtree("rm")
    run(*words, "combine.weights={rm: -1}", "rewards.rm.batch_tokens=7", rewards="[rm]")
    assert rewards() == {text: -value for text, value in before.items()}
    with pytest.raises(UserError, match="rewards.rm.model=rm: no such directory"):
        run(*words, "policy.truncated=keep", rewards="[rm]")
    shutil.copytree(reward_model_dir, "moved")
    run("rewards.rm.kind=model", "rewards.rm.model=moved", "policy.truncated=keep", rewards="[rm]")
    assert len(records()) == 4 and rewards() | before == rewards()


def make_samples(directory, finish=True):
    """What `fuserl sample` writes: a directory for each source."""
    for source, texts in (("a", ["x", "longer"]), ("b", ["middle", "cut"])):
        keys = key_array(key_of("p", source, i) for i in range(2))
        with Account(Path(directory, source), Plan({"source": source}), keys) as account:
            for i in (1, 0):
                row = {"prompt": "p", "source": source, "index": i, "response": texts[i], "meta": {"id": 7}}
                account.append(i, row | {"finish_reason": "length" if texts[i] == "cut" else "stop"})
            if finish or source == "a":
                account.finish({})


def test_directories_of_samples_and_build(tmp_path):
    make_samples("samples")
    report = run(samples="samples")
    assert [(r["source"], r["response"]) for r in records()] == [
        ("a", "x"),
        ("a", "longer"),
        ("b", "middle"),
        ("b", "cut"),
    ]
    assert records()[0]["key"] == key_of("p", "a", 0).hex() and records()[0]["meta"] == {"id": 7}
    assert report["flags"]["cut"] == 1
    loaded = load_groups(["scored"], Rejects("stop"), second_reward="rewards.counted")
    assert loaded.sources == ["a", "b"] and loaded.unknown_keys == {}
    assert [reward for reward, _ in loaded.groups[0].responses.values()] == [1, 6, 6, 3]
    assert sorted(loaded.second_rewards.values()) == [1, 3, 6, 6]
    with open("scored/records.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match="changed since"):
        load_groups(["scored"], Rejects("stop"))
    with pytest.raises(UserError, match="answers without rewards; `fuserl score samples=samples"):
        load_groups(["samples"], Rejects("stop"))
    os.remove("samples/b/done.json")
    with pytest.raises(UserError, match="samples/b: not finished"):
        run(samples="samples")


def test_rows_of_other_formats_are_answers_too():
    pair = {"prompt": "q", "chosen": "good", "rejected": "poor one", "chosen_model": "a", "rejected_model": "b"}
    write_records(Path("pairs.jsonl"), [pair | {"meta": {"id": 1}}])
    run(samples="[pairs.jsonl]")
    assert [(r["source"], r["reward"], r["meta"]) for r in records()] == [("a", 4, {"id": 1}), ("b", 8, {"id": 1})]
    Path("folder").mkdir()
    Path("pairs.jsonl").rename("folder/pairs.jsonl")
    assert run(samples="folder")["answers"] == 2
    write_records(Path("bad.jsonl"), [{"prompt": "q", "source": "a"}])
    with pytest.raises(UserError, match="bad.jsonl:1: field 'response' is missing"):
        run(samples="[bad.jsonl]")


def test_heldout_prompts_are_counted_and_dropped():
    prompts = ["What is the capital of France, and why?", "Short one", "Entirely unrelated words stand here now"]
    write_records(Path("answers.jsonl"), [{"prompt": p, "source": "a", "response": "r"} for p in prompts])
    write_records(Path("test.jsonl"), [{"prompt": "Tell me: what is the CAPITAL of France?"}, {"prompt": "short one!"}])
    words = ["heldout=[test.jsonl]", "heldout_ngram=5"]
    assert run(*words)["prompts_heldout"] == 2 and len(records()) == 3
    run(*words, "heldout_action=drop")
    assert [r["prompt"] for r in records()] == prompts[2:] and len(calls()) == 3


def test_report_page_is_one_file(tmp_path):
    write_records(Path("answers.jsonl"), [r | {"source": "<b>" + r["source"]} for r in RECORDS])
    report = run("combine.weights={length: 1}", rewards="[counted,length]")
    page = Path("scored/report.html").read_text()
    assert "<svg" in page and "&lt;b&gt;a" in page and "<b>" not in page
    assert not any(word in page for word in ("<script", "http", "src="))
    assert report["sources"]["<b>a"]["win_rate"] == 1.0
    assert report["rewards"]["counted"]["spread_sources"] == pytest.approx((0.5 + 2) / 2)
    assert report["correlations"]["counted ~ length"]["overall"] is None  # all answers have one word


def test_command_line(capsys):
    words = ["rewards.counted.kind=rule", "rewards.counted.function=my_rule:counted", "samples=[answers.jsonl]"]
    words += ["output=scored", "rewards=[counted]"]
    assert main(["score", "--dry-run", *words]) == 0
    assert "5 answers to 2 prompts from 2 sources" in (said := capsys.readouterr().out)
    assert "reward counted (rule): 0 have a value or a reason, 5 to do" in said and not Path("scored").exists()
    assert main(["score", "--status", "output=scored"]) == 2
    assert "nothing is scored there yet" in capsys.readouterr().err
    assert main(["score", *words]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "3", "3", "0.0%", "0", "0.0%", "1", "3", "100.0%", "4.667"] in lines
    assert main(["score", "--status", "output=scored"]) == 0
    assert capsys.readouterr().out.splitlines() == ["reward counted: 5 of 5, finished", "records.jsonl: 5 records"]
    assert main(["score", *words, "rewards.counted.time_limt=3"]) == 2
    assert "Did you mean time_limit?" in capsys.readouterr().err
    Path("elsewhere").mkdir()
    Path("elsewhere/thesis.tex").write_text("")
    assert main(["score", *words, "output=elsewhere"]) == 2
    assert "thesis.tex" in capsys.readouterr().err
