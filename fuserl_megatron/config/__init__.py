"""Configuration: frozen typed dataclasses, the hydra mapping onto them, and the checks before anything heavy starts."""
