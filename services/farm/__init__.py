"""The farm itself: its home and settings, its engine, the machine that it runs on."""
