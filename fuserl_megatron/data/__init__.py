"""From a fused data set to packed batches: selection, rows, order, stored reference log-probabilities."""
