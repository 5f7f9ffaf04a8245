"""Faults made on purpose, with real processes, signals and disks: ``python -m tests.faults``."""
