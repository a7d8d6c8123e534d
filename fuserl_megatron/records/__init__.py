"""From scored responses to a fused data set: formats, records, chat templates, tokens, build."""
