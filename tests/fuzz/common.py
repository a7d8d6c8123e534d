"""What the fuzzers share: a seed and a time give a report. Each is a module with `run(seed, seconds, cases) -> Report`.

    python tests/fuzz/models.py --seed 1 --seconds 60          # or: make fuzz

A case is right when it is done or refused in one line (UserError). It is a failure when anything else is raised, when
it takes longer than its limit, or when the fuzzer itself finds that something wrong was accepted (it raises Wrong).
"""

import argparse
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fuserl_megatron.util.errors import UserError

LIMIT_S = 20.0
"""For one case on an idle machine; they take milliseconds."""


class Wrong(AssertionError):
    """Something wrong was accepted in silence."""


class TimeUp(BaseException):
    """A case ran past its limit. No Exception: the code under test must not catch it."""


@dataclass
class Report:
    """What came out of the cases of one run."""

    name: str
    seed: int
    outcomes: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """How many were tried."""
        return sum(self.outcomes.values())

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        return "\n".join([f"{self.name} (seed {self.seed}): {self.cases} cases: {counts}", *self.failures])


def _time_up(_number: int, _frame: object) -> None:
    raise TimeUp


def attempt(report: Report, label: str, case: Callable[[], object], limit_s: float = LIMIT_S) -> str:
    """Run one case and count its outcome: done, refused, traceback, hang or wrong."""
    before = signal.signal(signal.SIGALRM, _time_up)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    problem = None
    try:
        case()
        outcome = "done"
    except UserError as error:
        outcome = "refused" if "\n" not in str(error) else "traceback"
        problem = "more than one line"
    except Wrong as error:
        outcome, problem = "wrong", str(error)
    except TimeUp:
        outcome, problem = "hang", f"not done after {limit_s} s"
    except Exception:
        outcome, problem = "traceback", traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    report.outcomes[outcome] += 1
    if outcome not in ("done", "refused") and len(report.failures) < 20:
        report.failures.append(f"{outcome}: {label}: {problem}")
    return outcome


def for_a_while(seconds: float, cases: int | None, seed: int) -> Iterable[random.Random]:
    """A generator of its own for each case, so that one can be repeated, until the time or the cases are over."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end and (cases is None or number < cases):
        yield random.Random(f"{seed} {number}")
        number += 1


def main(run: Callable[..., Report]) -> None:
    """The command line of a fuzzer; exit code 1 when there is a failure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cases", type=int, help="default: as many as fit into the time")
    options = parser.parse_args()
    report = run(options.seed, options.seconds, options.cases)
    print(report)
    sys.exit(1 if report.failures else 0)
