"""The models that look at pictures; each file holds one kind, loaded from a folder or a hub id."""
