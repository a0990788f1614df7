"""The errors that are the person's to solve: one message, exit status 2, no traceback."""

from __future__ import annotations


def bad_input() -> tuple[type[Exception], ...]:
    """Every such error type; imported late, since most commands can fail in only one of these ways."""
    from analysis import AnalysisError
    from orchestrator.connection import ConnectionProblem
    from orchestrator.durable import StoreError
    from orchestrator.submit import SubmitError
    from orchestrator.sweep_document import SweepError
    from tasks.registry import RegistryError

    return (SweepError, StoreError, ConnectionProblem, SubmitError, RegistryError, AnalysisError)
