"""Measurements, each against torch's DCP in the same run: ``python -m benchmarks <name>``."""
