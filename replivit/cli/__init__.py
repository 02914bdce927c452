"""One thin command per job; all work is a function of the harness that tests can call."""
