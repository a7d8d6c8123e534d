"""The metric that decides which checkpoint is best, checked before anything heavy starts: needs no Megatron."""

from collections.abc import Sequence

from fuserl_megatron.config.objective import open_loss
from fuserl_megatron.config.schema import Config
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import nearest


def check_monitor(config: Config, sources: Sequence[str]) -> None:
    """Refuse a monitor that no validation on these sources gives: UserError with the nearest one."""
    monitor = config.exp_manager.checkpoint_callback_params.monitor
    known = ["val_loss", *(f"val_{name}" for name in open_loss(config, sources).metric_names)]
    if monitor is not None and monitor not in known:
        raise UserError(
            f"exp_manager.checkpoint_callback_params.monitor={monitor}: no such metric.{nearest(monitor, known)} "
            f"There are: {', '.join(n for n in known if '/' not in n)}, and some of them per source."
        )
