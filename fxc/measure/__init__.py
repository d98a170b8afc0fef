"""Quality and time of models: perplexity, agreement with the original, latency."""
