"""What a step learns from: encoded pictures and captions, the batches of them, their views."""
