"""Sweeps before and after they run: planned, prepared, estimated, and read back from the store."""
