"""A process that has torch and transformers imported and forks a child per job: 0.4 s instead of 10 s to a result.

Run as `python -m tasks.forkserver`. Speaks JSON lines: a job on stdin; on stdout first `{"pid": ...}` or
`{"refused": reason}`, then `{"status": wait status}`. CUDA must not be initialised and no second thread may run when
it forks, so torchao and bitsandbytes, which ask for the device at import, are blocked here and freed in the child.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from pathlib import Path

BLOCKED = ("torchao", "bitsandbytes")
PREIMPORTED = (
    "torch",
    "torch.utils.flop_counter",
    "transformers",
    "transformers.cache_utils",
    "transformers.masking_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.resnet.modeling_resnet",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
    "safetensors.torch",
    "accelerate",
    "scipy.special",
    "tasks.run_cell",
)


# Threads that a fork survives: jemalloc (in pyarrow, where something imports it) stops and restarts its own around it.
HARMLESS_THREADS = frozenset({"jemalloc_bg_thd"})


def unready() -> str | None:
    """Why a child must not be forked from this process now, or None."""
    torch = sys.modules["torch"]
    if torch.cuda.is_initialized():
        return "CUDA is initialised in the server"
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir() if int(task.name) != os.getpid()]
    others = sorted(set(names) - HARMLESS_THREADS)
    return f"the server has other threads: {', '.join(others)}" if others else None


def _release_blocked() -> None:
    """In the child: make the blocked packages importable, and forget that they looked absent."""
    for name in BLOCKED:
        sys.modules.pop(name, None)
    import_utils = importlib.import_module("transformers.utils.import_utils")
    for name in BLOCKED:
        cached = getattr(import_utils, f"is_{name}_available", None)
        # transformers wraps the cached function to make it a constant under torch.compile
        while cached is not None and not hasattr(cached, "cache_clear"):
            cached = getattr(cached, "__wrapped__", None)
        if cached is not None:
            cached.cache_clear()


def main() -> None:
    from tasks.child import die_with_parent, end_group, run_job

    die_with_parent(os.getppid())
    reader = os.fdopen(os.dup(0), "r")
    writer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log, not into the protocol
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment] # importlib's own way to say "not there"
    for name in PREIMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    writer.write(json.dumps({"ready": True, "pid": os.getpid()}) + "\n")
    for line in reader:
        job_path = Path(json.loads(line)["job"])
        reason = unready()
        if reason:
            writer.write(json.dumps({"refused": reason}) + "\n")
            continue
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            reader.close()
            writer.close()
            _release_blocked()
            run_job(job_path, parent=server, kind="fork")  # never returns
        writer.write(json.dumps({"pid": pid}) + "\n")
        _, status = os.waitpid(pid, 0)
        end_group(pid)
        writer.write(json.dumps({"status": status}) + "\n")


if __name__ == "__main__":
    main()
