"""Plans and runs the matrix; the only package that knows Ray."""
