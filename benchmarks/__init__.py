"""Benchmarks: `make bench`, `benchmarks/gpu.sh`. A speed is reported only behind a green correctness gate."""
