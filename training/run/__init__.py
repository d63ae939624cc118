"""A sweep's trials on Ray Train: what the driver and the workers of a group do with them."""
