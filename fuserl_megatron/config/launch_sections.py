"""Settings of `fuserl launch`: which stages, where they run, and what they share. The stages' own sections (fusesft,
build_sft, sample, ...) hold overrides of the commands `train`, `build`, `sample`, `logprobs` and `score`."""

from dataclasses import dataclass, field
from typing import Literal

# fmt: off
StageName = Literal["sample", "logprobs", "score", "import", "build_sft", "build_po", "build_heldout", "fusesft",
                    "reference", "fusepo", "export", "evaluate"]
# fmt: on


@dataclass(frozen=True, kw_only=True)
class LaunchRunConfig:
    """What this chain is called and where it writes."""

    name: str = "fuserl"
    """Names the jobs: NAME-STAGE."""
    results_dir: str = "runs/pipeline"
    """Every stage writes to a folder of its name in here; launch/ holds frozen settings, job scripts, logs, markers."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where stages run and on how much; STAGE.cluster.KEY=... says it for one stage."""

    type: Literal["slurm", "local"] = "local"
    """slurm submits one job a stage; local runs them one after the other on this machine."""
    nodes: int = 1
    """Nodes of the stages that train, evaluate or score a reference; the others take one process."""
    ntasks_per_node: int | None = None
    """Ranks on a node; null takes gpus_per_node, and without GPUs 1 (local: TP x PP x CP of the stage)."""
    gpus_per_node: int | None = None
    """GPUs asked for on a node; null asks for none."""
    cpus_per_task: int | None = None
    """Cores of a rank; null leaves it to the cluster."""
    mem: str | None = None
    """Memory of a node, such as 200G; null leaves it to the cluster."""
    partition: str | None = None
    """SLURM partition; null takes the cluster's default."""
    account: str | None = None
    """SLURM account; null takes the user's default."""
    qos: str | None = None
    """SLURM quality of service; null takes the default."""
    time: str | None = None
    """Wall-clock limit of a job, such as 24:00:00; null takes the partition's."""
    signal_seconds: int = 300
    """Seconds before the limit at which training is told to save and is put back into the queue."""
    max_requeues: int = 100
    """How many times a job may put itself back into the queue."""
    dependency: str | None = None
    """What the first stages wait for, in sbatch's words, such as afterok:1234."""
    sbatch_options: tuple[str, ...] = ()
    """Further options of sbatch, such as --exclusive or --constraint=h100."""
    container: str | None = None
    """Image for pyxis (srun --container-image); null runs on the node itself."""
    container_mounts: tuple[str, ...] = ()
    """HOST:CONTAINER paths."""
    venv: str | None = None
    """Virtual environment that every job activates; null takes the fuserl on PATH."""
    setup: tuple[str, ...] = ()
    """Shell lines run at the start of every job, such as module load cuda."""
    env: tuple[str, ...] = ()
    """NAME=value for the environment of every job. Frozen with the run: no secrets."""

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node."""
        return self.ntasks_per_node or self.gpus_per_node or 1

    @property
    def num_ranks(self) -> int:
        """Processes over all nodes."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The stage that writes the last checkpoint as a Hugging Face directory, in one process without a GPU."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the written weights; null keeps the checkpoint's."""
    max_shard_size: str = "5GB"
    """Of one safetensors file."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """A chain of stages (`fuserl launch`)."""

    stages: tuple[StageName, ...] = ("build_sft", "build_po", "fusesft", "reference", "fusepo", "export")
    """What to run. The order is the pipeline's, whatever the order here."""
    target: str = "???"
    """The model to train: a Hugging Face directory, or with the stage `import` a Megatron checkpoint."""
    run: LaunchRunConfig = field(default_factory=LaunchRunConfig)
    """Name and place."""
    launcher: str = "fuserl"
    """Who makes the jobs: fuserl itself, nemo (nemo-run's SlurmExecutor or LocalExecutor, docs/nemo.md), or
    package.module:object, a launcher of your own (docs/extending.md)."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where and on how much."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """The stage `export`."""
