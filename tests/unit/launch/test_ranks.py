"""The launcher of local ranks, with small programs as ranks: what it passes on, prints and leaves behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fuserl_megatron.launch import ranks
from fuserl_megatron.util.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(ranks, "OTHERS_MAY_REPORT_S", 0.7)


def run(program, num_ranks=2):
    head = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    return ranks.run_ranks([sys.executable, "-c", head + program], num_ranks)


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition, seconds=600.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def test_every_rank_gets_its_place(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    program = f"open(rf'{tmp_path}/{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert run(program, 3) == 0
    actual = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    threads, port = str(max(1, len(os.sched_getaffinity(0)) // 3)), actual[0][4]
    assert actual == [[str(rank), str(rank), "3", "127.0.0.1", port, threads] for rank in range(3)]


def test_the_users_own_thread_count_is_kept():
    own = {"OMP_NUM_THREADS": "7", "GLOO_SOCKET_IFNAME": "eth0", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    assert ranks.rank_environment(1, 4, 29500, own | {"RANK": "9"}).items() >= (own | {"RANK": "1"}).items()


@pytest.mark.parametrize(("cores", "expected"), [(8, "4"), (1, "1")])
def test_threads_and_connections_of_a_rank(monkeypatch, cores, expected):
    """Cores as the scheduler grants them, whatever the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    environ = ranks.rank_environment(0, 2, 29500, {})
    assert (environ["OMP_NUM_THREADS"], environ["CUDA_DEVICE_MAX_CONNECTIONS"]) == (expected, "1")


def test_rank_0_has_the_terminal_and_the_others_are_marked(capfd):
    assert run("print('out', rank); print('err', rank, file=sys.stderr)") == 0
    out, err = capfd.readouterr()
    assert out == "out 0\n"
    assert sorted(err.splitlines()) == ["[rank 1] err 1", "[rank 1] out 1", "err 0"]


def test_a_user_error_of_all_ranks_is_printed_once(capfd):
    assert run("print('fuserl: error: x is wrong', file=sys.stderr); sys.exit(2)", 3) == 2
    assert capfd.readouterr().err == "fuserl: error: x is wrong\n"


def test_a_user_error_of_one_rank_is_printed_and_ends_all(capfd):
    program = "if rank == 1: print('fuserl: error: no disk here', file=sys.stderr); sys.exit(2)\ntime.sleep(2000)"
    started = time.monotonic()
    assert run(program, 3) == 2
    assert time.monotonic() - started < 600
    assert capfd.readouterr().err == "fuserl: error: no disk here\n"


def test_what_a_user_error_of_rank_0_does_to_the_others_is_not_shown(capfd):
    """The others lose their connection to rank 0, complain at length, and may even be gone before it is."""
    program = (
        "print('hello', file=sys.stderr, flush=True)\n"
        "if rank == 1: raise RuntimeError('Connection closed by peer')\n"
        "time.sleep(0.4); print('fuserl: error: no such place', file=sys.stderr); sys.exit(2)"
    )
    assert run(program) == 2
    assert sorted(capfd.readouterr().err.splitlines()) == ["[rank 1] hello", "fuserl: error: no such place", "hello"]


def test_a_rank_that_goes_on_after_a_traceback_is_heard(monkeypatch, capfd):
    """The log of an exception that was handled is no last word, even where another rank then meets a user error."""
    monkeypatch.setattr(ranks, "HELD_LINES", 5)
    program = (
        "if rank == 1:\n"
        "    print('Traceback (most recent call last)')\n"
        "    for n in range(6): print('line', n, flush=True)\n"
        "    print('Traceback (most recent call last)', flush=True); time.sleep(2000)\n"
        "time.sleep(0.5); print('fuserl: error: no such place', file=sys.stderr); sys.exit(2)"
    )
    assert run(program) == 2
    heard = [f"[rank 1] {line}" for line in ("Traceback (most recent call last)", *(f"line {n}" for n in range(6)))]
    assert sorted(capfd.readouterr().err.splitlines()) == sorted([*heard, "fuserl: error: no such place"])


def test_a_crash_ends_all_and_its_exit_code_is_passed_on(capfd):
    words = "print('boom', flush=True); print('Traceback (most recent call last)'); print('x')"
    started = time.monotonic()
    assert run(f"if rank == 1: {words}; sys.exit(3)\ntime.sleep(2000)") == 3
    assert time.monotonic() - started < 600
    err = capfd.readouterr().err
    assert err.startswith("[rank 1] boom\n[rank 1] Traceback (most recent call last)\n[rank 1] x\n")
    assert err.endswith("fuserl: error: rank 1 ended first, with exit code 3; the other ranks were ended.\n")


def test_a_killed_rank_is_named(capfd):
    assert run("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(2000)") == 128 + 9
    assert "rank 1 ended first, killed by SIGKILL (out of memory?)" in capfd.readouterr().err


def test_a_rank_that_ignores_sigterm_is_killed():
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank == 1: time.sleep(1); sys.exit(5)\ntime.sleep(999)"
    started = time.monotonic()
    assert run(program) == 5
    assert time.monotonic() - started < 600


def start_launcher(tmp_path, body):
    """A launcher in a process of its own, whose two ranks write their pids and then do `body`."""
    program = (
        "import os, signal, sys, time\nrank = os.environ['RANK']\n"
        f"{body.split('|')[0]}\nopen(rf'{tmp_path}/{{rank}}.tmp', 'w').write(str(os.getpid()))\n"
        f"os.rename(rf'{tmp_path}/{{rank}}.tmp', rf'{tmp_path}/{{rank}}.pid')\n{body.split('|')[1]}\n"
    )
    code = (
        "import sys; from fuserl_megatron.launch import ranks; ranks.OTHERS_MAY_REPORT_S = 0.5\n"
        f"sys.exit(ranks.run_ranks([sys.executable, '-c', {program!r}], 2))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    wait_until(lambda: all((tmp_path / f"{rank}.pid").exists() for rank in range(2)))
    return launcher, [int((tmp_path / f"{rank}.pid").read_text()) for rank in range(2)]


def test_ctrl_c_ends_all(tmp_path):
    launcher, pids = start_launcher(tmp_path, "signal.signal(signal.SIGINT, signal.SIG_IGN)|time.sleep(2000)")
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
    assert launcher.wait(timeout=600) == 130
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_signals_are_passed_on_and_the_ranks_decide(tmp_path, name):
    body = f"signal.signal(signal.{name}, lambda *_: sys.exit(0))|time.sleep(2000)"
    launcher, pids = start_launcher(tmp_path, body)
    launcher.send_signal(getattr(signal, name))
    assert launcher.wait(timeout=600) == 0
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_ranks_may_take_their_time_after_a_signal(tmp_path, monkeypatch, name):
    """Held back from the first moment on, also while ranks are starting; nobody is ended for taking longer."""
    body = (
        "from fuserl_megatron.runtime import stopping\ntime.sleep(0.5)\n"
        "with stopping.held():\n stopping.listen()\n"
        " while not stopping._received: time.sleep(0.02)\n"
        f" time.sleep(3.0 * int(rank)); open(rf'{tmp_path}/{{rank}}.saved', 'w').close()"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = f"import os, time\nrank = os.environ['RANK']\nopen(rf'{tmp_path}/{{rank}}.pid', 'w').close()\n{body}"
    code = (
        "import sys; from fuserl_megatron.launch import ranks; from fuserl_megatron.runtime import stopping\n"
        f"with stopping.held(): sys.exit(ranks.run_ranks([sys.executable, '-c', {program!r}], 2))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    wait_until(lambda: all((tmp_path / f"{rank}.pid").exists() for rank in range(2)))
    os.killpg(launcher.pid, getattr(signal, name))  # the ranks hear it twice: from here and from the launcher
    assert launcher.wait(timeout=600) == 0
    assert all((tmp_path / f"{rank}.saved").exists() for rank in range(2))


def test_no_rank_outlives_a_killed_launcher(tmp_path):
    launcher, pids = start_launcher(tmp_path, "|time.sleep(2000)")
    launcher.kill()
    launcher.wait(timeout=600)
    wait_until(lambda: all(gone(pid) for pid in pids))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "8"}, 8),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # an sbatch script, before any srun
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_who_started_this_process(environ, expected):
    assert ranks.is_rank(environ) == (expected is not None)
    if expected is not None:
        assert ranks.launched_world_size(environ) == expected


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "x"}, "WORLD_SIZE=x: "),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0: "),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK=: "),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1: "),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "\u0662"}, r"LOCAL_RANK=\\u0662: "),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "zz"}, "MASTER_PORT=zz: "),
        ({"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS=: "),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is not"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "x", "SLURM_NTASKS": "2"}, "SLURM_PROCID=x: "),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "9" * 5000}, "SLURM_NTASKS=9999"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "a"}, "SLURM_LOC"),
    ],
)
def test_a_place_that_is_none_is_one_line(environ, name):
    with pytest.raises(UserError, match=name):
        ranks.is_rank(environ)
