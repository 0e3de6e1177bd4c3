"""The faults of `bench/faults.py`, a file per area; each has a list `FAULTS`."""
