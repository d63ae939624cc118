"""What people ask of the farm: jobs, sweeps, registry entries, imports and the command line."""
