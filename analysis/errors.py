"""The errors of this package that are the person's to solve."""


class AnalysisError(ValueError):
    """A result folder that cannot be read, or a question that its rows cannot answer; the message says which."""


class NoRows(AnalysisError):
    """A result folder without a row yet."""
