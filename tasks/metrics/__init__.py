"""One file per metric; discovered, never listed."""
