"""Kill training with SIGKILL, start it again, and compare with a run that nobody disturbed, bit for bit.

    python tests/durability/crash.py --runs 200 --seed 1

Two ranks: TP 2, and DP 2 with the distributed optimizer; checkpoints written at once and in the background, after every
step, so that a good part of the time one is being written. A trial starts a run, kills it up to three times (all ranks,
or one and a moment later the other) and lets it finish. Half of the kills come at a moment of the clock; half at the
n-th thing that a rank does to a file below checkpoints/ (make, open, rename, remove): in the middle of a save, or of
what follows one. What must hold: metrics.jsonl has every step once, with the losses and gradient norms of the
undisturbed run to the last bit, the exported weights are equal to the last bit, and nothing half-written is left.

Ranks are forked by a process that has imported everything (fleet.py); every 20th trial is the real `fuserl train
--nproc 2` in new processes. The seed fixes what is killed how; when a rank gets there is the machine's affair.
"""

import argparse
import dataclasses
import multiprocessing.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "durability"), str(TESTS / "distributed"), str(TESTS)]

from fleet import ROOT, Fleet, case_settings, records  # noqa: E402

STEPS = 6
LAYOUTS = {
    "tp2": ["model.tensor_model_parallel_size=2"],
    "dp2 distopt": ["optim.use_distributed_optimizer=true"],
}
ASYNC = "exp_manager.checkpoint_callback_params.async_save=true"
MOST_KILLS = 3
LONGEST_S = 300.0
"""A run that takes longer hangs."""


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What a trial is compared with."""

    steps: list[tuple]
    """Step, loss and gradient norm."""
    weights: bytes
    seconds: float
    events: list[int]
    """Things that each rank did to files below checkpoints/."""


def overrides(case: dict, directory: Path, layout: str, in_background: bool) -> list[str]:
    return case_settings(
        case,
        directory / "run",
        f"trainer.max_steps={STEPS}",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
        *LAYOUTS[layout],
        *([ASYNC] if in_background else []),
    )


def watch_files(directory: str, victim: int, countdown: int, rank: int) -> None:
    """In a rank: count what it does to files below `directory`; the victim dies at event number `countdown`."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        if any(isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(directory) for a in arguments[:2]):
            count += 1
            if count == countdown and rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if countdown == 0:  # only count
        write = lambda: Path(f"{directory}.events{rank}").write_text(str(count))  # noqa: E731
        multiprocessing.util.Finalize(None, write, exitpriority=0)  # such a process runs no atexit functions


def result(directory: Path) -> tuple[list[tuple], bytes]:
    """What a finished run has written; hf/ holds nothing that depends on the clock."""
    steps = [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records(directory / "run")]
    return steps, (directory / "run" / "hf" / "model.safetensors").read_bytes()


def undisturbed(fleet: Fleet, case: dict, directory: Path, layout: str) -> Undisturbed:
    directory.mkdir()
    counted = directory / "run" / "checkpoints"
    started = time.monotonic()
    run = fleet.start(
        overrides(case, directory, layout, False), directory / "log", prelude=partial(watch_files, str(counted), 0, 0)
    )
    if run.wait(LONGEST_S) != [0, 0]:
        raise RuntimeError(f"the undisturbed run failed:\n{run.text()}")
    seconds = time.monotonic() - started
    steps, weights = result(directory)
    return Undisturbed(steps, weights, seconds, [int(Path(f"{counted}.events{r}").read_text()) for r in range(2)])


def problems(expected: Undisturbed, directory: Path) -> list[str]:
    """What is wrong with the outcome of a trial."""
    steps, weights = result(directory)
    found = []
    if [s[0] for s in steps] != [s[0] for s in expected.steps]:
        found.append(f"metrics.jsonl has steps {[s[0] for s in steps]}")
    elif steps != expected.steps:
        found.append(f"other losses: {[(a, e) for a, e in zip(steps, expected.steps, strict=True) if a != e]}")
    if weights != expected.weights:
        found.append("other weights")
    left = [
        str(p.relative_to(directory)) for p in (directory / "run").rglob(".*") if p.name.endswith((".partial", ".tmp"))
    ]
    return found + ([f"left over: {left}"] if left else [])


def kill_once(
    fleet: Fleet, words: list[str], directory: Path, rng: random.Random, expected: Undisturbed, remaining: int
) -> str | None:
    """Start the run and kill it; in words how, or None when it was done first."""
    everything = rng.random() < 0.5
    victim = rng.randrange(2)
    log = directory / "log"
    if rng.random() < 0.5:
        moment = rng.uniform(0.0, expected.seconds)
        run = fleet.start(words, log)
        deadline = time.monotonic() + moment
        while run.alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        how = f"after {moment:.2f} s"
        if not run.alive():
            return _ended(run, how)
        run.send(signal.SIGKILL, None if everything else victim)
    else:
        event = rng.randrange(1, max(2, expected.events[victim] * (remaining + 1) // STEPS))
        prelude = partial(watch_files, str(directory / "run" / "checkpoints"), victim, event)
        run = fleet.start(words, log, prelude=prelude)
        how = f"at file event {event}"
        deadline = time.monotonic() + LONGEST_S
        while run.ranks[victim].exitcode is None and time.monotonic() < deadline:
            time.sleep(0.001)
        if run.ranks[victim].exitcode != -signal.SIGKILL:
            return _ended(run, how)
    if not everything:
        time.sleep(rng.uniform(0.0, 1.0))  # the other rank meets a closed connection, or waits
    run.kill()
    return f"{'both' if everything else f'rank {victim}'} {how}"


def _ended(run, how: str) -> None:
    codes = run.wait(LONGEST_S)
    if codes != [0, 0]:
        raise RuntimeError(f"to be killed {how}, but ended by itself with {codes}:\n{run.text()}")


def kill_launcher(words: list[str], directory: Path, rng: random.Random, seconds: float) -> str:
    """The real command line in new processes; the launcher or a rank is killed, the rest is the product's affair."""
    command = [sys.executable, "-m", "fuserl_megatron.cli", "train", "--nproc", "2", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(directory / "log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
        deadline, moment = time.monotonic() + LONGEST_S, rng.uniform(0.0, seconds)
        while not (directory / "run" / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
            if time.monotonic() > deadline:
                raise TimeoutError("the launcher's run does not start")
        time.sleep(moment)
        ranks = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        victim = rng.choice([process.pid, *ranks[:2]])
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(60)
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):  # the launcher leaves nothing behind
            time.sleep(0.01)
            if time.monotonic() > deadline:
                raise TimeoutError("a rank outlives its launcher")
    who = "launcher" if victim == process.pid else "a rank of the launcher"
    return f"{who} {moment:.2f} s after the first step"


def trial(fleet: Fleet, case: dict, directory: Path, number: int, seed: int, expected: dict, real: bool) -> list[str]:
    """One trial; returns what is wrong. Prints one line."""
    rng = random.Random(f"{seed}/{number}")
    layout, in_background = list(LAYOUTS)[number % 2], number // 2 % 2 == 1
    directory.mkdir()
    words, kills, started = overrides(case, directory, layout, in_background), [], time.monotonic()
    if real:
        kills.append(kill_launcher(words, directory, rng, expected[layout].seconds / 2))
    wanted = rng.randint(1, MOST_KILLS)
    while len(kills) < wanted:
        remaining = STEPS - max([r["step"] for r in records(directory / "run", whole=False)], default=0)
        how = kill_once(fleet, words, directory, rng, expected[layout], remaining)
        if how is not None:
            kills.append(how)
        elif kills:
            break
        else:  # done before its first moment: that shows nothing, so once more from the start
            shutil.rmtree(directory / "run")
    run = fleet.start(words, directory / "log")
    codes = run.wait(LONGEST_S)
    found = problems(expected[layout], directory) if codes == [0, 0] else [f"exit codes {codes}: {run.text()[-2000:]}"]
    resumed = [line.rsplit(" ", 1)[1] for line in run.text().splitlines() if "resuming after step" in line]
    print(
        f"trial {number:3d} | {layout:11s} | {'async' if in_background else 'sync ':5s} | killed: "
        f"{', '.join(kills)} | resumed after steps {', '.join(resumed) or '-'} | "
        f"{time.monotonic() - started:.1f} s | {'; '.join(found) or 'bit-equal'}",
        flush=True,
    )
    return found


def run_trials(fleet: Fleet, case: dict, root: Path, runs: int, seed: int, real_every: int = 0) -> list[str]:
    """All trials; returns those that failed, whose directories are kept."""
    overhead = fleet.start(["--help"], root / "warm-up", world=1)  # the imports, once
    overhead.wait(LONGEST_S)
    expected = {layout: undisturbed(fleet, case, root / layout.replace(" ", "-"), layout) for layout in LAYOUTS}
    failed = []
    for number in range(runs):
        directory = root / f"trial-{number}"
        real = bool(real_every) and number % real_every == real_every - 1
        found = trial(fleet, case, directory, number, seed, expected, real)
        if found:
            failed.append(f"trial {number} ({directory}): {'; '.join(found)}")
        else:
            shutil.rmtree(directory)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument(
        "--real-every", type=int, default=20, metavar="N", help="every Nth through the launcher; 0: none"
    )
    options = parser.parse_args()
    from fusion_case import make_case

    root = options.dir or Path(tempfile.mkdtemp(prefix="fuserl-crash-"))
    root.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    failed = run_trials(Fleet(), make_case(root), root, options.runs, options.seed, options.real_every)
    print(*failed, sep="\n")
    equal, seconds = options.runs - len(failed), time.monotonic() - started
    print(f"{equal} of {options.runs} bit-equal, seed {options.seed}, {seconds:.0f} s")
    if not failed and options.dir is None:
        shutil.rmtree(root)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
