"""The training run: the loop read top to bottom, its schedules and its log."""
