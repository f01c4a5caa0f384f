"""Sweeps: many students from one cache."""
