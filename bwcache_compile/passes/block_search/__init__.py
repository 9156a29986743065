"""How the repeated blocks are found."""
