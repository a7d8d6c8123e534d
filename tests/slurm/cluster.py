"""A throw-away SLURM cluster of several nodes on this machine: real munged, slurmctld and slurmd, all state in one
folder."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def why_not() -> str | None:
    """The reason why no cluster can be started here, None when one can."""
    missing = [p for p in PROGRAMS if shutil.which(p, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt install --no-install-recommends slurm-wlm munge)"
    return None if os.geteuid() == 0 else "starting slurmd needs root"


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Cluster:
    """Use as a context manager; `environment` is what SLURM's commands need to find it."""

    def __init__(self, root: Path, num_nodes: int = 2):
        self.root, self.nodes = Path(root), [f"n{i + 1}" for i in range(num_nodes)]
        self.environment = os.environ | {"SLURM_CONF": str(self.root / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool", "log", "munge", "socket"):
            (self.root / name).mkdir(parents=True)
        for path, mode in ((self.root, 0o755), (self.root / "munge", 0o700), (self.root / "socket", 0o755)):
            path.chmod(mode)
        # munge insists that every folder above its socket can be entered by all
        for parent in self.root.parents:
            if parent.stat().st_mode & 0o005 != 0o005 and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o055)
        key, socket_file = self.root / "munge" / "key", self.root / "socket" / "munge"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._call(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={socket_file}",
            f"--pid-file={self.root / 'munge' / 'munged.pid'}",
            f"--log-file={self.root / 'munge' / 'log'}",
            f"--seed-file={self.root / 'munge' / 'seed'}",
            "--num-threads=2",
        )
        (self.root / "slurm.conf").write_text(self._config(socket_file))
        self._call("slurmctld", "-c", "-f", str(self.root / "slurm.conf"))
        for node in self.nodes:
            (self.root / "spool" / node).mkdir()
            self._call("slurmd", "-N", node, "-f", str(self.root / "slurm.conf"))
        deadline = time.monotonic() + 600
        while len(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) < len(self.nodes):
            if time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(
                    "the nodes did not come up:\n" + (self.root / "log" / "slurmctld").read_text()[-2000:]
                )
            time.sleep(0.2)
        return self

    def __exit__(self, *exc_info) -> None:
        subprocess.run(["scancel", "-u", "root"], env=self.environment, timeout=10, capture_output=True)
        pids = [
            int(f.read_text())
            for f in [*self.root.glob("*.pid"), *self.root.glob("munge/*.pid")]
            if f.read_text().strip()
        ]
        for sig in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                try:
                    os.kill(pid, sig)
                except ProcessLookupError:
                    pass
            time.sleep(1.0)

    def run(self, *command: str, **options) -> str:
        """Output of one of SLURM's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=600, **options)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def wait(self, job: str, timeout: float = 900) -> str:
        """The final state of a job; of an array COMPLETED where all tasks are, else that of one that is not."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            states = set(re.findall(r"JobState=(\w+)", self.run("scontrol", "-o", "show", "job", job)))
            if not states & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}:
                return min(states - {"COMPLETED"}, default="COMPLETED")
            time.sleep(0.5)
        raise TimeoutError(f"job {job} is still {', '.join(states)}")

    def _call(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, timeout=600, capture_output=True)

    def _config(self, munge_socket: Path) -> str:
        host = socket.gethostname().split(".")[0]
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={_port()}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={munge_socket},cred_expire=5",
            "CredType=cred/munge",
            f"StateSaveLocation={self.root / 'state'}",
            f"SlurmdSpoolDir={self.root / 'spool'}/%n",
            f"SlurmctldPidFile={self.root / 'slurmctld.pid'}",
            f"SlurmdPidFile={self.root}/slurmd-%n.pid",
            f"SlurmctldLogFile={self.root / 'log' / 'slurmctld'}",
            f"SlurmdLogFile={self.root / 'log'}/slurmd-%n",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "MpiDefault=none",
            "ReturnToService=2",
            "SlurmctldParameters=enable_configless",
            "KillWait=5",
            "MinJobAge=300",
        ]
        for node in self.nodes:
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={_port()} CPUs=2 RealMemory=1000"
            )
        lines.append(
            f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=60 State=UP OverSubscribe=NO"
        )
        return "\n".join(lines) + "\n"
