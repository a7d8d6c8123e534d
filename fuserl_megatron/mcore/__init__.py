"""The one room that imports megatron.core."""
