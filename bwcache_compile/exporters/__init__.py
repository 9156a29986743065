"""Writing cached programs to files for other runtimes. Nothing is here yet."""
