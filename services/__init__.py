"""People's requests in, jobs, sweeps and registry entries out: the command line lives here."""
