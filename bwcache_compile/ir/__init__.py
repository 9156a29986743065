"""The intermediate representation: programs, and what reads, prints, checks and edits their graphs."""
