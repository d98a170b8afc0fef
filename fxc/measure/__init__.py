"""Quality and time of models."""
