"""Adapters registered under names, and the record of the runs that they come from, in MLflow."""
