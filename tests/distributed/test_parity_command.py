"""`fuserl parity`: passes where the layout is right, sees planted mistakes, starts its ranks itself."""

import contextlib
import io
import re
from unittest import mock

import psutil
import pytest
from fusion_case import DPO, LOSSES, SFT, make_case, make_config
from mistakes import mistake

from fuserl_megatron.cli import main

ROWS = ["loss", "gradient norm", "embedding", "qkv", "proj", "fc1", "fc2", "norms", "output"]


def parity_of(config, fault=None, **options):
    """Exit code and what was printed, with a mistake planted when asked for."""
    from fuserl_megatron.proofs import parity

    planted = mistake(fault) if fault else contextlib.nullcontext()
    with planted, contextlib.redirect_stdout(io.StringIO()) as out:
        return parity.parity(config, **options), out.getvalue()


def worst(text):
    """Row of the table -> worst relative error."""
    found = {row: re.search(rf"^{row} +(\S+)", text, re.M) for row in ROWS}
    return {row: float(match[1]) for row, match in found.items() if match}


RIGHT = {
    "fusesft, tp2 sp, prefix shared": (SFT, dict(tp=2, sp=True, share="on", seq_length=240)),
    "fusesft, pp2, weighted tokens": (SFT | {"nll_reduction": "weighted_token_mean"}, dict(pp=2)),
    "dpo, pp2 vpp2, full recompute": (DPO, dict(pp=2, vpp=2, recompute="full")),
    "dpo, cp2, prefix shared": (DPO, dict(cp=2, share="on", seq_length=240)),
    "kto, dp2, distributed optimizer": (LOSSES["kto"], dict(distopt=True)),
    "wrpo, tp2": (LOSSES["wrpo"], dict(tp=2, seq_length=200)),
}


def two_batches(config):
    return parity_of(config, steps=2)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_layout_passes_on_two_batches(ranks, case, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    objective, changes = RIGHT[name]
    config = make_config(case, objective, global_batch_size=4, results_dir=str(tmp_path / "run"), **changes)
    (code, text), (other_code, other_text) = ranks.run(two_batches, 2, config)
    assert (code, other_code, other_text) == (0, 0, ""), text
    assert list(worst(text)) == ROWS and max(worst(text).values()) < 1e-5
    assert not (tmp_path / "run").exists()


def test_the_float64_side_is_finer_than_what_it_judges(ranks, case):
    """A world of one, packed: what remains is the rounding of fp32, so the other side is not fp32, too."""
    text = ranks.run(parity_of, 1, make_config(case, SFT))[0][1]
    assert 1e-8 < worst(text)["qkv"] < 1e-5


@pytest.mark.parametrize(
    "fault, objective, changes, seen",
    [
        ("ignore_segments", SFT, dict(tp=2), "loss"),
        ("divide_by_local_count", DPO, dict(pp=2, rows=6), "gradient norm"),
        ("divide_by_local_count", SFT, dict(), "output"),
        ("norm_not_marked", SFT, dict(tp=2, sp=True), "norms"),
    ],
)
def test_a_planted_mistake_fails(ranks, case, fault, objective, changes, seen):
    code, text = ranks.run(parity_of, 2, make_config(case, objective, **changes), fault)[0]
    assert code == 1 and "THE LAYOUT DOES NOT GIVE" in text
    assert worst(text)[seen] > 1e-3 and "past the threshold" in text
    if fault == "norm_not_marked":  # names the culprit, and nothing else
        assert {row for row, error in worst(text).items() if error > 1e-5} <= {"norms", "gradient norm"}


def test_tied_embeddings_bf16_and_a_threshold_of_ones_own(ranks, tmp_path):
    config = make_config(make_case(tmp_path, tie=True), LOSSES["simpo"], pp=2, seq_length=200, precision="bf16")
    code, text = ranks.run(parity_of, 2, config)[0]
    assert code == 0 and list(worst(text)) == ROWS[:-1]  # the output layer is the embedding
    assert ranks.run(with_threshold, 2, config, max(worst(text).values()) / 2)[0][0] == 1


def with_threshold(config, threshold):
    return parity_of(config, threshold=threshold)


def too_large(config):
    with mock.patch.object(psutil, "virtual_memory", lambda: mock.Mock(available=1_000_000)):
        try:
            return parity_of(config)
        except ValueError as error:
            return str(error)


def test_a_model_too_large_for_float64_is_refused_on_every_rank(ranks, case):
    answers = ranks.run(too_large, 2, make_config(case, DPO, tp=2))
    for answer in answers:
        assert "in float64, rank 0 has 0.0 GB: compare with a smaller model" in answer and "\n" not in answer


def overrides(case):
    return [
        "trainer=cpu",
        "trainer.precision=32",
        f"model.path={case['policy']}",
        f"data.path={case['data']}",
        "data.seq_length=160",
        "data.micro_batch_size=2",
        "data.global_batch_size=7",
        "model.tensor_model_parallel_size=2",
    ]


def test_the_command_starts_its_ranks_and_hands_on_threshold_and_exit_code(case, capfd, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["parity", "--nproc", "2", *overrides(case), "--threshold", "1e-12"]) == 1
    out, err = capfd.readouterr()
    assert "TP 2" in out and "threshold 1e-12" in out and max(worst(out).values()) < 1e-5, out + err


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--steps", "0"], "--steps 0"),
        (["--threshold", "-1"], "--threshold"),
        (["--nproc", "3"], "world size 3"),
        (["model.path=nowhere"], "nowhere"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(case, capsys, words, problem):
    assert main(["parity", *overrides(case), *words]) == 2
    assert problem in (err := capsys.readouterr().err) and err.count("\n") == 1
