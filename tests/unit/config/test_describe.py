"""`fuserl keys` and docs/settings.md say of every setting what it is."""

from pathlib import Path

import pytest

from fuserl_megatron.cli import main
from fuserl_megatron.config.describe import commands, settings
from fuserl_megatron.config.keys import all_keys

ROOT = Path(__file__).resolve().parents[3]


def test_every_key_of_every_command_is_there_with_a_meaning():
    found = list(settings())
    assert [s.key for s in found if not s.meaning] == []
    for command, (schema, *_) in commands().items():
        keys = {s.key for s in found if s.command == command}
        sections = {key.rpartition(".")[0] for key in keys}
        missing = set(all_keys(schema)) - keys - sections
        assert not [key for key in missing if not any(section.startswith(f"{key}.") for section in sections)]


def test_the_page_is_what_the_command_prints(capsys):
    assert main(["keys", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed == (ROOT / "docs" / "settings.md").read_text(), "type: fuserl keys --markdown > docs/settings.md"


def test_types_and_defaults():
    found = {s.key: s for s in settings("train")}
    assert (found["optim.betas"].type, found["optim.betas"].default) == ("[float, ...]", "[0.9,0.95]")
    assert found["model.path"].default == "" and found["trainer.max_steps"].type == "int | null"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["micro_batch"], "train  data.micro_batch_size: int (default 1)"),
        (["learning_rate"], "learning_rate: Did you mean optim.lr?"),
        (["lora_r"], "lora_r: Did you mean adapter.rank?"),
        (["max_length", "--of", "build"], "build  max_length: int (default 2048)"),
    ],
)
def test_searching(words, says, capsys):
    assert main(["keys", *words]) == 0
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"), [(["qqqqqqq"], "no key and no meaning has it"), (["--of", "trian"], "Did you mean train")]
)
def test_what_is_not_there(words, says, capsys):
    assert main(["keys", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
