"""Slow and obvious versions of the numerics, for tests only."""
