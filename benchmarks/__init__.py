"""Benchmarks: how fast the library is and how much memory it takes, beside the straightforward way to do the same.

Not a part of the package. `make bench` runs the ones for a CPU; docs/performance.md says what each of them counts.
"""
