"""Reads Parquet, never a GPU: pairing, statistics, tables."""
