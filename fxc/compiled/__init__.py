"""What users hold: a compiled model, called as the original was, with generation, saving and export."""
