"""On how much a stage runs: the chain's resources, or one process of them, with the stage's own over both."""

import dataclasses
import re
from collections.abc import Sequence

from fuserl_megatron.config.compose import compose_tree
from fuserl_megatron.config.derived import replica_ranks
from fuserl_megatron.config.launch_sections import ClusterConfig, LaunchConfig
from fuserl_megatron.config.load import from_dict
from fuserl_megatron.config.schema import Config
from fuserl_megatron.launch.sections import key_of
from fuserl_megatron.util.errors import UserError


def resources(chain: ClusterConfig, words: Sequence[str], training: Config | None, gpus: int | None) -> ClusterConfig:
    """Resources of one stage.

    Args:
        chain: those of the whole chain.
        words: overrides `cluster.KEY=VALUE` of this stage.
        training: its settings, where it trains; every other stage is one process.
        gpus: what that process gets of a node's: all where it starts servers, one for a reward model, else None.

    On this machine a stage that trains takes the ranks of its layout, as `fuserl train` does, unless it is said.

    Raises:
        UserError: a value that cannot work.
    """
    values = compose_tree(LaunchConfig, "config", words)["cluster"] if words else {}
    alone = {} if training else dict(nodes=1, ntasks_per_node=1, gpus_per_node=gpus)
    changed = {key: values[key] for key in (key_of(word).partition(".")[2] for word in words)}
    merged = dataclasses.asdict(chain) | alone | changed
    cluster = from_dict(LaunchConfig, {"target": "-", "cluster": merged}).cluster
    if cluster.type != chain.type:
        raise UserError(f"cluster.type={cluster.type}: is the same for all stages; write cluster={cluster.type}.")
    _check(cluster)
    if training and cluster.type == "local" and cluster.ntasks_per_node is cluster.gpus_per_node is None:
        return dataclasses.replace(cluster, ntasks_per_node=replica_ranks(training.model))
    return cluster


def _check(cluster: ClusterConfig) -> None:
    for name in ("nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task", "signal_seconds"):
        if (value := getattr(cluster, name)) is not None and value < 1:
            raise UserError(f"cluster.{name}={value}: must be at least 1; cluster.{name}=1 would work.")
    if cluster.type == "local" and cluster.nodes > 1:
        raise UserError(f"cluster.nodes={cluster.nodes}: cluster=local is one machine; cluster.nodes=1 would work.")
    for pair in cluster.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", pair, re.DOTALL):
            raise UserError(f"cluster.env=[{pair}]: is no NAME=value; 'cluster.env=[\"NCCL_DEBUG=WARN\"]' would work.")
