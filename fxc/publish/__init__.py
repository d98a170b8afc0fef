"""An artifact, or an export of it, on the Hugging Face hub."""
