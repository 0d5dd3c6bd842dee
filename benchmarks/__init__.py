"""Benchmarks: `python -m benchmarks.NAME`; each prints a table and writes `benchmarks/results/NAME.json`."""
