"""The command line: `app` runs it, `arguments` describes it, `commands` calls the rooms."""

from fuserl_megatron.cli.app import main as main
