"""Measurements with goals. Each module is one command (`python -m benchmarks.<name>`), prints a table and
writes build/bench/<name>.json."""
