"""The settings of `fuserl sample`: how sources are found and changed, and what is refused."""

import pytest

from fuserl_megatron.cli.app import main
from fuserl_megatron.config.sample_load import load_sample
from fuserl_megatron.util.errors import UserError

RUN = ["prompts=[p.jsonl]", "output=o"]


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "qwen2.5.yaml"
    file.write_text('model: q\nurl: [http://h/v1]\nsystem: |\n  two\n  lines\nsampling: {stop: ["\\nQ:"]}\n')
    return str(file)


def complaint(*words):
    with pytest.raises(UserError) as caught:
        load_sample([*RUN, *words])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sources_by_name_and_by_path_with_settings_of_their_own(mine, tmp_path):
    words = [f"sources=[qwen25_72b,{mine}]", "n=3", "sources.qwen2.5.sampling.top_k=7", "sources.qwen2.5.model=r"]
    run, (shipped, own) = load_sample([*RUN, *words])
    assert (run.n, run.sources) == (3, ("qwen25_72b", mine))
    assert (shipped.name, shipped.sampling.temperature, shipped.sampling.repetition_penalty) == (
        "qwen25_72b",
        0.7,
        1.05,
    )
    assert (own.name, own.model, own.url, own.sampling.top_k) == ("qwen2.5", "r", ("http://h/v1",), 7)
    assert own.system == "two\nlines\n" and own.sampling.stop == ("\nQ:",)


def test_sources_of_a_directory_of_ones_own(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "base.yaml").write_text("model: q\nsampling: {top_p: 0.5}\n")
    (tmp_path / "source" / "warm.yaml").write_text(
        "defaults: [source/base@_here_, _self_]\nsampling: {temperature: 1.5}\n"
    )
    (tmp_path / "mine.yaml").write_text("prompts: [p.jsonl]\noutput: o\nsources: [warm]\nn: 2\n")
    run, (warm,) = load_sample([], tmp_path, "mine")
    assert (run.n, warm.name, warm.model) == (2, "warm", "q")
    assert (warm.sampling.temperature, warm.sampling.top_p) == (1.5, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sources=[lama31_70b]"], "no source lama31_70b. Did you mean llama31_70b?"),
        (["sources=[no/such.yaml]"], "no/such.yaml: no such file"),
        (["sources=[openai_compatible]"], "model: required and not set; type sources.openai_compatible.model="),
        (["sources=[llama31_70b]", "sources.lama.n=2"], "sources.lama.n: no such source"),
        (["sources=[llama31_70b,llama31_70b]"], "llama31_70b is named twice"),
        (["sources=[llama31_70b]", "num=2"], "num: no such key"),
        (["n=0"], "n=0: must be at least 1; n=5 would work"),
        (["max_failures=1.5"], "max_failures=1.5: must be a share"),
    ],
)
def test_runs_that_are_refused(words, message):
    assert message in complaint(*words)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sampling.temprature=1", "no such key. Did you mean sampling.temperature?"),
        ("sampling.temperature=-1", "sampling.temperature=-1.0: must not be negative"),
        ("sampling.top_p=0", "must be above 0 and at most 1"),
        ("sampling.extra_body.topp_k=3", "no such setting. Did you mean top_k?"),
        ("sampling.extra_body.top_p=3", "is a setting of its own; write sampling.top_p"),
        ("sampling.extra_body.n=3", "sampling fills in this field itself"),
        ("sampling.extra_body.seed=3", "sampling fills in this field itself"),
        ("url=[node7:8000]", "url=node7:8000: must begin with http:// or https://"),
        ("name=a/b", "name=a/b: becomes a folder"),
        ("kind=completions", "not one of chat, completion. Did you mean completion?"),
        ("api_key_env=sk-proj-abcdefghijklmnop1234", "api_key_env: holds no name of an environment variable"),
        ("system=sk-proj-abcdefghijklmnop1234", "system: looks like a key; write api_key_env=NAME"),
        ("sampling.extra_body.api_key=abc", "sampling.extra_body.api_key: looks like a key"),
        ("server.args.api_key=abc", "server.args.api_key: looks like a key"),
        ("server.command='vllm serve {modell} --port {port}'", "server.command: {modell} is unknown"),
        ("server.command='vllm serve {model}'", "server.command: must hold {port}"),
        ("max_in_flight=0", "max_in_flight=0: must be at least 1"),
    ],
)
def test_sources_that_are_refused(setting, message):
    found = complaint("sources=[llama31_70b]", f"sources.llama31_70b.{setting}")
    assert found.startswith("source llama31_70b: ") and message in found
    assert "abcdefghijklmnop1234" not in found


def test_a_completion_source_has_no_template(tmp_path):
    own = tmp_path / "a.yaml"
    own.write_text("model: m\nkind: completion\nurl: [http://h/v1]\n")
    for setting, message in (
        ("system=s", "system: a completion source has no chat template"),
        ("prompt_format=x", "prompt_format: must hold {prompt}"),
        ("revision=abc", "revision: only a server that is started here"),
    ):
        assert message in complaint(f"sources=[{own}]", f"sources.a.{setting}")


def test_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "output=o"]) == 2
    assert "sources=[]: needs at least one" in capsys.readouterr().err
    assert main(["sample", "output=o", "--status"]) == 2
    assert "o: no such directory" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["sample", *RUN, "sources=[llama31_70b]"]) == 2
    assert "llama31_70b: vllm is not on PATH; install it, or give the url" in capsys.readouterr().err
    running = ["sources=[openai_compatible]", "sources.openai_compatible.model=m"]
    assert main(["sample", *RUN, *running]) == 2
    assert "prompts: p.jsonl does not exist" in capsys.readouterr().err
    assert main(["sample", "output=o", *running]) == 2
    assert "prompts is empty" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
