"""Datasets of characters: taken in, captioned, checked, reviewed, frozen, shared."""
