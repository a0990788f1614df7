"""Plans and runs the matrix; the only package that knows Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.execute import Finished
    from orchestrator.sweep import Sweep

__all__ = ["run"]


def run(
    sweep: str | Path | Mapping[str, Any] | Sweep,
    *,
    out: str | Path | None = None,
    address: str | None = None,
    **options: Any,
) -> Finished:
    """What `benchmatrix run` does, from Python: `analysis.load(finished.out)` gives the rows.

    Args:
        sweep: a path, the name of a shipped sweep, its content as a mapping, or a `Sweep`.
        out: the result folder or a URI such as `s3://bucket/results`; default `results/<sweep>`.
        address: a running Ray cluster; default a private instance on this machine.
        options: further fields of `orchestrator.execute.Options`.

    Raises the errors of `orchestrator.problems.bad_input` for a bad sweep, a locked folder or an absent cluster.
    """
    from orchestrator.execute import Options, execute

    source = str(sweep) if isinstance(sweep, Path) else sweep
    return execute(source, Options(out=out, address=address, **options))
