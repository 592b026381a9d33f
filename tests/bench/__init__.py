"""Benchmarks: ratios measured side by side in one run, printed, never asserted. See the README for the commands."""
