"""The data that a step learns from: encoded pictures and captions, and batches of them."""
