"""What ``python -m benchmarks.kernels`` measures: how it does (case, clock, measured, results), and each point."""
