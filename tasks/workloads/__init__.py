"""One file per workload; discovered, never listed."""
