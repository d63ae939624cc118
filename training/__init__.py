"""A dataset version and recipes in, checkpoints, scores and adapter files out."""
