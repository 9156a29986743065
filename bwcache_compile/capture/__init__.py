"""From a module to a program."""
