"""The model families: each module here says `FAMILIES = {model_type: Family(...)}`. Adding one is adding a file."""

import importlib
import pkgutil

from fuserl_megatron.convert.family import Family

FAMILIES: dict[str, Family] = {}
for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    FAMILIES.update(importlib.import_module(f"{__name__}.{_module.name}").FAMILIES)
