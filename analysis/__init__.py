"""Reads Parquet, never a GPU: pairing, statistics, tables."""

from analysis.baseline import against
from analysis.coverage import Coverage, coverage
from analysis.errors import AnalysisError
from analysis.growth import growth_table
from analysis.ladder import ladder_table
from analysis.load import load, load_plan, load_samples
from analysis.pair import cells, pairs
from analysis.render import FORMATS, print_table, render
from analysis.table import Table
from analysis.tables import comparison_table
from analysis.tradeoff import tradeoff_table
from analysis.verdicts import verdicts

__all__ = [
    "FORMATS",
    "AnalysisError",
    "Coverage",
    "Table",
    "against",
    "cells",
    "comparison_table",
    "coverage",
    "growth_table",
    "ladder_table",
    "load",
    "load_plan",
    "load_samples",
    "pairs",
    "print_table",
    "render",
    "tradeoff_table",
    "verdicts",
]
