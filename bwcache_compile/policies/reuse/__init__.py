"""Ways of reusing, a file each."""
