"""Benchmarks that a user can run on a GPU of their own: ``halo-train bench``."""
