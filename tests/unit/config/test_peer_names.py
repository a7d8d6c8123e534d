"""Settings under the names that other trainers give them, and no suggestion where none is near."""

import pytest

from fuserl_megatron.cli import main
from fuserl_megatron.config.compose import conf_dir
from fuserl_megatron.config.keys import about_key, all_keys
from fuserl_megatron.config.peer_names import BY_NAME, OF_BUILD, PEERS
from fuserl_megatron.config.schema import BuildConfig, Config

KEYS = set(all_keys(Config))


def test_every_key_that_is_named_exists_and_no_name_stands_twice():
    groups = {folder.name for folder in conf_dir().iterdir() if folder.is_dir()}
    for peer in PEERS:
        assert peer.ours in KEYS or (peer.ours is None and peer.note), peer
        for word in peer.note.replace(",", " ").split():
            section, dot, rest = word.rstrip(".").partition(".")
            if dot and rest and section in {"optim", "data", "model", "trainer", "run", "objective"} | groups:
                assert f"{section}.{rest}" in KEYS | {"cluster.nodes"}, word
    assert len(BY_NAME) == sum(len(peer.theirs.split()) for peer in PEERS) > 150 and len(PEERS) >= 55
    assert set(OF_BUILD) <= KEYS and set(OF_BUILD.values()) <= set(all_keys(BuildConfig))


def test_a_name_of_ours_needs_no_row():
    last = {key.rpartition(".")[2] for key in KEYS}
    assert last & set(BY_NAME) == set()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("learning_rate=1", "Did you mean optim.lr?"),
        ("optim.learning_rate=1", "Did you mean optim.lr?"),
        ("per_device_train_batch_size=1", "Did you mean data.micro_batch_size?"),
        ("gradient_accumulation_steps=4", "There is none: gradient accumulation follows from data.global_batch_size"),
        ("num_train_epochs=3", "Did you mean trainer.max_epochs?"),
        ("max_steps=3", "Did you mean trainer.max_steps?"),
        ("warmup_ratio=3", "Did you mean optim.sched.warmup_ratio?"),
        ("lora_r=8", "Did you mean adapter.rank?"),
        ("lora_alpha=8", "Did you mean adapter.alpha?"),
        ("peft=lora", "Did you mean adapter.kind? (adapter=lora sets it)"),
        ("load_in_4bit=true", "There is none: an adapter is plain LoRA beside unquantized weights"),
        ("nproc=2", "the number of ranks is --nproc N"),
        ("bf16=true", "Did you mean trainer.precision?"),
        ("model.tensor_parallel_size=2", "Did you mean model.tensor_model_parallel_size?"),
        ("save_steps=2", "Did you mean exp_manager.checkpoint_callback_params.every_n_train_steps?"),
        ("logging_steps=2", "Did you mean trainer.log_every_n_steps?"),
    ],
)
def test_what_people_type(capsys, word, says):
    assert main(["train", word]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fuserl: error: {word.partition('=')[0]}: no such key. ") and says in said


def test_other_commands_answer_with_their_own_keys(capsys):
    for words, says in (
        (["build", "model_name_or_path=x"], "Did you mean tokenizer?"),
        (["build", "learning_rate=1"], "It is optim.lr of fuserl train"),
        (["launch", "learning_rate=1"], "in fuserl launch train.optim.lr or STAGE.optim.lr"),
        (["launch", "load_in_4bit=1"], "There is none: an adapter is plain LoRA"),
    ):
        assert main(words) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("key", ["help", "x", "foo.bar", "colour", "optim.zzz", "banana_split"])
def test_nothing_near_is_no_suggestion(key):
    assert about_key(key, KEYS) == ""
