"""What happens on one node for one cell: load, apply, prove, warm up, measure, check."""
