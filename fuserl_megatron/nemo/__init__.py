"""For NeMo users: NeMo-Aligner's files as settings, and nemo-run as a launcher."""
