"""From scored responses to packed batches: records, pairs, tokens, rows, sampling order, stored reference log-probabilities."""
