"""Writing cached programs to files for other runtimes, and running them there. What opens a bundle needs no torch."""
