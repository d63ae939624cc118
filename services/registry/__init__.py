"""Adapters registered under names, and the MLflow runs that they come from."""
