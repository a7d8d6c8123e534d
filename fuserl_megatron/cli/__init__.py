"""The command line: one file a command, each with `add` (its options) and `run`; `app` puts them together."""

from fuserl_megatron.cli.app import main as main
