"""Benchmarks, python -m bench.NAME; they may import everything."""
