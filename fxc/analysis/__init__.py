"""What can be known of a program without running it: which sizes belong together, and which of their parts matter."""
