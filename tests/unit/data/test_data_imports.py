"""Importing the room costs neither transformers nor megatron."""

import subprocess
import sys
from pathlib import Path

import fuserl_megatron.data


def test_importing_the_room_loads_neither_transformers_nor_megatron():
    names = sorted(p.stem for p in Path(fuserl_megatron.data.__file__).parent.glob("*.py") if p.stem != "__init__")
    code = "import sys\n" + "".join(f"import fuserl_megatron.data.{n}\n" for n in names)
    code += "print([m for m in ('megatron', 'transformers', 'datasets') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
