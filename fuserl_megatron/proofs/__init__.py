"""Are two computations the same? Layout parity and model verification."""
