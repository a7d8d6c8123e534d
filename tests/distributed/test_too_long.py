"""data.on_too_long in real runs: a layout has the numbers of one process on what is left; a run goes on as it began."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import pytest
from fusion_case import DPO, LOSSES, make_config


def short_rows(case, objective, mode, seq_length, **settings):
    """Rows so short that some pairs, groups or responses do not fit."""
    config = make_config(case, objective, rows=1, seq_length=seq_length, **settings)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, on_too_long=mode))


def printed(config, command):
    from fuserl_megatron.proofs.parity import parity
    from fuserl_megatron.train.loop import train
    from fuserl_megatron.util.errors import UserError

    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = train(config) if command == "train" else parity(config)
        except UserError as error:
            return 2, str(error)
    return code, out.getvalue()


@pytest.mark.parametrize("mode", ["skip", "truncate"])
@pytest.mark.parametrize("name", ["dpo", "rloo"])
def test_a_layout_has_the_numbers_of_one_process(ranks, case, tmp_path, name, mode):
    objective, length = (DPO, 98) if name == "dpo" else (LOSSES[name], 112)
    config = short_rows(case, objective, mode, length, global_batch_size=4, results_dir=str(tmp_path))
    (code, text), _ = ranks.run(printed, 2, config, "parity")
    assert code == 0, text
    assert "the layout gives the numbers of one process" in text
    counted = text.partition(f"data.on_too_long={mode}: ")[2].partition("\n")[0]
    skipped, cut = (int(part.rpartition(" ")[2]) for part in counted.split(", "))
    assert (skipped > 0, cut > 0) == ((True, False) if mode == "skip" else (False, True))


def test_a_run_goes_on_with_what_it_left_out(ranks, case, tmp_path):
    """KTO, whose mismatched pairs are cut along; stored references belong to the responses as they are cut."""
    settings = dict(global_batch_size=4, max_steps=1, every=1, results_dir=str(tmp_path / "run"))
    config = short_rows(case, LOSSES["kto"], "truncate", 50, **settings)
    ((code, text),) = ranks.run(printed, 1, config, "train")
    assert code == 0, text
    progress = json.loads(next(Path(tmp_path / "run").rglob("progress.json")).read_text())
    assert progress["data.on_too_long"].startswith("truncate ")
    ((code, text),) = ranks.run(printed, 1, config, "train")
    assert code == 0, text
    for changed in (dict(on_too_long="skip"), dict(seq_length=51)):
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, **changed))
        ((code, said),) = ranks.run(printed, 1, other, "train")
        assert code == 2 and "data.on_too_long=truncate" in said
