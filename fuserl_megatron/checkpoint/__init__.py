"""Distributed checkpoints as files: format, reader, manifest. No Megatron here."""
