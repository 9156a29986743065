"""Export programs to torch's own files."""
