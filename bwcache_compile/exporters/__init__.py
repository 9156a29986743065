"""Write cached programs to files for other runtimes. The code that opens them is in `bundle` and needs no torch."""
