"""Bundles: what they hold, and how they are opened and run. Needs no torch but in `runners`."""
