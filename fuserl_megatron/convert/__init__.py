"""Hugging Face <-> Megatron: one name table, pure layout functions in both directions, streaming file access."""
