"""The exit codes of `lorafarm`: 0 is done; the others are named here."""

EXIT_BROKEN = 1  # something broke
EXIT_USER = 2  # the person can mend it, and the message says how
EXIT_INTERRUPTED = 130  # stopped by Ctrl-C, as shells have it
