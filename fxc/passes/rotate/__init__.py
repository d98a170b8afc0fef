"""The mechanism that turns channels by a Hadamard matrix."""
