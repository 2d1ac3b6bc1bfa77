"""Checkpoints: what is saved, how it lies on disk, and which run is continued."""
