"""Code that the benchmarks share: turns, processes and their CPU time, timed training, and tables."""
