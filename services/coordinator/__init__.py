"""Runs what was asked for: a prepared sweep in, its winner registered."""
