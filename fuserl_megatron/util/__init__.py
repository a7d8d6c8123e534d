"""Small helpers that know nothing of models, data or Megatron; every room may use them."""
