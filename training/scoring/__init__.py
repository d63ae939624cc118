"""Checkpoints judged: pictures from fixed prompts and seeds, measures, intervals, the choice."""
