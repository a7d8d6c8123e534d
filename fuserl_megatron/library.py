"""The package as a library: what the commands of `fuserl` do, as functions that take a config and give results.

    from fuserl_megatron import build, load_config, train, evaluate, convert, LOSSES

Settings are those of the commands (`load_config("train", ["optim.lr=1e-5", ...])`); mistakes in them raise a
`fuserl_megatron.util.errors.UserError` of one line before anything starts. Rooms are imported inside the functions.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fuserl_megatron.config.load import load_config as load_config
from fuserl_megatron.config.load import to_yaml
from fuserl_megatron.config.schema import BuildConfig, Config

if TYPE_CHECKING:
    from fuserl_megatron.data.manifest import Manifest


def build(config: BuildConfig, progress: bool = True) -> "Manifest":
    """Write a data set from scored responses, as `fuserl build`.

    Args:
        config: from `load_config("build", [...])`.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        The manifest: counts, token statistics, sources, each with its mean weight.

    Raises:
        UserError: a setting or a record is wrong (file:line), or the disk is full. Nothing is left over.
    """
    from fuserl_megatron.records.build import build as run

    return run(config, progress)


def train(config: Config, num_ranks: int | None = None) -> Path:
    """Run FuseSFT or FusePO, as `fuserl train`: start it, or continue it from its newest checkpoint.

    A single rank is this process. Several are started as processes of their own, unless this process is one of them
    already (torchrun, srun): then every rank calls this.

    Args:
        config: from `load_config("train", [...])`.
        num_ranks: processes; None takes as many as the layout needs (TP x PP x CP).

    Returns:
        run.results_dir: metrics.jsonl, checkpoints, and with run.export the trained model in hf/. A run that was
        stopped to be continued has left the file REQUEUE there.

    Raises:
        UserError: settings, model and data do not fit.
        RuntimeError: the run ended on a loss that is not finite, or could not write; the reason was printed.
    """

    def run(config: Config) -> int:
        from fuserl_megatron.train.loop import train

        return train(config)

    _on_ranks(config, num_ranks, "train", run)
    return Path(config.run.results_dir)


def evaluate(config: Config, before: str | None = None, num_ranks: int | None = None) -> dict[str, Any]:
    """Loss and metrics of model.path on data.path, as `fuserl evaluate`; ranks as in `train`.

    Args:
        config: from `load_config("train", [...])`.
        before: a model directory to compare with, such as the one that training started from.
        num_ranks: as in `train`.

    Returns:
        What results_dir/evaluation.json holds: metrics by name under "fusesft", with a FusePO objective also under
        "fusepo", and the same of the other model under "before".

    Raises:
        UserError: settings, models and data do not fit.
        RuntimeError: a loss is not finite.
    """

    def run(config: Config) -> int:
        from fuserl_megatron.records.belonging import compare
        from fuserl_megatron.train.evaluate import evaluate

        if before is not None:
            compare(config.data.path, "before", before, (*config.run.disable_checks, "template_match"))
        return evaluate(config, before)

    _on_ranks(config, num_ranks, "evaluate", run, *([] if before is None else [f"--before={before}"]))
    return json.loads(Path(config.run.results_dir, "evaluation.json").read_text(encoding="utf-8"))


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Literal["megatron", "hf"],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    force: bool = False,
    hf: str | Path | None = None,
) -> Path:
    """Convert a model directory, as `fuserl convert`, in this process and without a GPU.

    Args:
        source: a Hugging Face directory (to="megatron"), or a Megatron checkpoint or a run's directory (to="hf").
        destination: the directory to write.
        to: the format to write.
        dtype: of the weights written; None keeps the source's.
        force: replace a non-empty destination.
        hf: with to="hf": where config and tokenizer are, when the checkpoint does not say.

    Returns:
        The destination.

    Raises:
        UserError: one line; nothing is left behind, and an older destination is untouched.
    """
    from fuserl_megatron.convert import offline
    from fuserl_megatron.util.errors import UserError

    if to == "hf":
        return offline.megatron_to_hf(source, destination, hf=hf, dtype=dtype, force=force)
    if to != "megatron":
        raise UserError(f"to={to}: must be megatron or hf.")
    if hf is not None:
        raise UserError(f"hf={hf}: is used with to=hf only.")
    return offline.hf_to_megatron(source, destination, dtype=dtype, force=force)


def _on_ranks(config: Config, num_ranks: int | None, command: str, run: Callable[[Config], int], *words: str) -> None:
    """Check everything, then run here or start the ranks."""
    from fuserl_megatron.config.derived import replica_ranks
    from fuserl_megatron.launch import ranks
    from fuserl_megatron.train.preflight import check, lock_of, with_local_models
    from fuserl_megatron.util.own_rank import own_rank

    is_rank = ranks.is_rank()
    num_ranks = ranks.launched_world_size() if is_rank else num_ranks or replica_ranks(config.model)
    first = own_rank() == 0 or not is_rank
    with contextlib.ExitStack() as held:
        if first:
            held.enter_context(lock_of(config))
        _, differences = check(config, num_ranks)
        config = with_local_models(config)
        if is_rank or num_ranks == 1:
            for line in differences if first else ():
                print(line, flush=True)
            with contextlib.nullcontext() if is_rank else _as_only_rank(config):
                code = run(config)
    if not is_rank and num_ranks > 1:  # the lock is given up: rank 0 takes it
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "config.yaml")
            file.write_text(to_yaml(config), encoding="utf-8")
            program = [sys.executable, "-m", "fuserl_megatron.cli", command, *words, f"--config-name={file}"]
            code = ranks.run_ranks(program, num_ranks)
    if code:
        raise RuntimeError(f"{command} ended with exit code {code}; the reason is printed above")


@contextlib.contextmanager
def _as_only_rank(config: Config) -> Iterator[None]:
    """The environment of a single rank, as long as it lasts."""
    from fuserl_megatron.launch.here import becomes_rank

    before = dict(os.environ)
    try:
        becomes_rank(config, 1)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
