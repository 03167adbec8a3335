"""Benchmarks of diator, as ratios to hand-written code."""
