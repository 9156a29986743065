"""Models written as other people write them, each with a feature that block finding must bear."""
