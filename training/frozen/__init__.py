"""The frozen base in memory: quantised, or its weights shared out over the workers."""
