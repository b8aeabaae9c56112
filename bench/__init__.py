"""Benchmarks: gpuconv against its peers, on this machine, in one run. ``python -m bench --help``."""
