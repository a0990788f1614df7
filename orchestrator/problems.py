"""The errors that are the person's to solve: one message, exit status 2, no traceback."""

from __future__ import annotations

import sys

_ERRORS = {
    "analysis.errors": ("AnalysisError",),
    "orchestrator.cluster": ("ClusterFileError",),
    "orchestrator.connection": ("ConnectionProblem",),
    "orchestrator.durable": ("StoreError",),
    "orchestrator.submit": ("SubmitError",),
    "orchestrator.sweep_document": ("SweepError",),
    "tasks.models.identity": ("ModelError",),
    "tasks.registry": ("RegistryError",),
    "tasks.uri": ("UriError",),
}


def bad_input() -> tuple[type[Exception], ...]:
    """Every such error type that can have been raised: those whose module is loaded, so that asking loads nothing."""
    loaded = [(sys.modules[module], names) for module, names in _ERRORS.items() if module in sys.modules]
    return tuple(getattr(module, name) for module, names in loaded for name in names)
