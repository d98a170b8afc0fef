"""What each command does: the steps, and which table shows which result. `fxc.cli` parses and calls."""
