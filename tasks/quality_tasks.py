"""Named tasks of lm-evaluation-harness on the model that is already in memory: the extra `quality`.

Everything of the library stays in here. Nothing is cached between stacks: a cache of requests would give one model the
other's answers. The softmax is taken in fp32, since in bf16 it would lose more than the stacks differ by.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.environment import version
from tasks.metric import Missing

if TYPE_CHECKING:
    from tasks.session import Session

PACKAGE = "lm-eval"
INSTALL = "pip install '.[quality]'"
BATCH = 8
BOOTSTRAPS = 1000  # of the few metrics whose standard error has no closed form


def run_tasks(session: Session) -> str | Missing:
    """JSON of task -> metric -> `{"value", "stderr", "n"}`; a filter of a task follows the metric's name after a comma.

    With a tasks folder only its tasks are known, and relative paths in them are taken from it. Any failure of a task is
    a reason, never the end of the cell: it was measured before.
    """
    job, loaded = session.job, session.loaded
    if not job.quality_tasks:
        return Missing(reason="the sweep names no tasks of lm-evaluation-harness")
    if version(PACKAGE) is None:
        return Missing(reason=f"needs {PACKAGE}: {INSTALL}")
    if loaded is None or loaded.tokenizer is None or loaded.weights != "trained":
        return Missing(reason="needs trained weights and a tokenizer")
    try:
        with contextlib.chdir(job.quality_tasks_path or Path.cwd()), _one_process():
            found = _evaluate(session)
    except Exception as error:
        traceback.print_exc()
        return Missing(reason=f"lm-eval failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return json.dumps(figures(found), sort_keys=True)


def _evaluate(session: Session) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    assert session.loaded is not None
    job = session.job
    folder = job.quality_tasks_path or None
    model = HFLM(
        pretrained=session.model, tokenizer=session.loaded.tokenizer, batch_size=BATCH, softmax_dtype="float32"
    )
    found: dict[str, Any] = simple_evaluate(
        model=model, tasks=list(job.quality_tasks), limit=job.quality_tasks_limit, log_samples=False,
        task_manager=TaskManager(include_path=folder, include_defaults=folder is None),
        use_cache=None, cache_requests=False, bootstrap_iters=BOOTSTRAPS,
    )  # fmt: skip
    return found


def figures(found: dict[str, Any]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """What the library's results say about each task and group: numbers only, null where it gives none."""
    tasks: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for task, values in {**found["results"], **found.get("groups", {})}.items():
        n = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue  # not a figure: the task's name, its alias, the number of its samples
            name = metric if kind == "none" else key
            error = _number(values.get(f"{metric}_stderr,{kind}"))
            tasks.setdefault(task, {})[name] = {"value": _number(value), "stderr": error, "n": n}
    return tasks


def _number(value: Any) -> float | None:
    """A finite number, else None: the library writes "N/A" where it has none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@contextlib.contextmanager
def _one_process() -> Any:
    """The library would fork a pool of processes from one that has CUDA and threads."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
