"""NeMo's names for where a run lies, folded into run.results_dir and run.name, so that the rest knows those two alone.

exp_manager.explicit_log_dir     is run.results_dir
otherwise                        run.results_dir / exp_manager.name / exp_manager.version
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fuserl_megatron.config.rules import refuse
from fuserl_megatron.config.schema import Config
from fuserl_megatron.util.errors import UserError


def fold(config: Config, overrides: Sequence[str] = ()) -> Config:
    """The same run with explicit_log_dir, name and version null and run.results_dir and run.name saying what they said.

    What a yaml file says under run is replaced, what was typed (`overrides`) is not.

    Raises:
        UserError: two settings that name different places, or a folder's name that is none.
    """
    manager, run = config.exp_manager, config.run
    typed = {text.lstrip("+").partition("=")[0] for text in overrides}
    for field in ("name", "version"):
        value = getattr(manager, field)
        if value is not None and (not value or value in (".", "..") or "/" in value):
            refuse(config, f"exp_manager.{field}", "must be the name of one folder", "first")
    if manager.explicit_log_dir is not None and manager.version is not None:
        rule = f"exp_manager.explicit_log_dir={manager.explicit_log_dir} is the whole path"
        refuse(config, "exp_manager.version", rule, None)
    for field, ours in (("explicit_log_dir", "results_dir"), ("name", "name")):
        value = getattr(manager, field)
        if value is not None and f"run.{ours}" in typed and value != getattr(run, ours):
            raise UserError(
                f"exp_manager.{field}={value}: run.{ours}={getattr(run, ours)} says otherwise; leave one of them out."
            )
    place = Path(run.results_dir, *(part for part in (manager.name, manager.version) if part is not None))
    return dataclasses.replace(
        config,
        run=dataclasses.replace(run, name=manager.name or run.name, results_dir=manager.explicit_log_dir or str(place)),
        exp_manager=dataclasses.replace(manager, explicit_log_dir=None, name=None, version=None),
    )
