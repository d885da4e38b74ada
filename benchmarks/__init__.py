"""Benchmarks: speed and memory of the library, compared with a straightforward implementation.

Not part of the package. `make bench` runs those for a CPU; docs/performance.md explains what each of them measures.
"""
