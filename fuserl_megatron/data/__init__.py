"""From scored responses to packed batches: records, tokens, pairs, rows, order, stored reference log-probabilities."""
