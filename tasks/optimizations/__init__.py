"""One file per optimization technique; discovered, never listed."""
