"""What runs the graphs of a bundle: one file a backend."""
