"""Memory: what PyTorch allocated and reserved on the device, what the process holds, and the peaks of three phases.

Inputs are rotated so that no cache holds them; the sets that wait for their turn are left out of the allocated figures.
A runtime that is not PyTorch allocates for itself, and nobody else sees its peaks: on a device it has `runtime_bytes`,
by which the process has grown since before loading, and null where PyTorch's allocator would tell of its own part.
Peaks are reset before loading, before warm-up and before measuring, so that a compiler's or a load's peak does not
hide the steady one. On a CPU the high-water mark of the resident set is reset through /proc/self/clear_refs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.metric import Column, Metric, Missing, Phase

if TYPE_CHECKING:
    from tasks.session import Session

_DEVICE_COLUMNS = {
    "allocated_bytes": "allocated by tensors after measuring",
    "peak_allocated_bytes": "greatest allocated while measuring",
    "peak_allocated_bytes_load": "greatest allocated while loading",
    "peak_allocated_bytes_warmup": "greatest allocated in first call and warm-up, compilation included",
    "peak_requested_bytes": "greatest requested by the program while measuring, before rounding",
    "reserved_bytes": "held by the caching allocator after measuring",
    "peak_reserved_bytes": "greatest reserved while measuring",
    "graph_pool_bytes": "reserved by private pools of CUDA graphs",
    "allocation_retries": "allocations that first had to free the cache, since the start",
    "peak_process_bytes": "NVML's figure for this process after measuring: context and libraries included",
    "non_torch_bytes": "of peak_process_bytes, what PyTorch's allocator does not know",
    "runtime_bytes": "growth of the process on the device since before loading, where it is not PyTorch that computes: "
    "weights, free parts of its arenas, and code of its kernels",
}
_ALL = {
    **_DEVICE_COLUMNS,
    "peak_host_bytes": "greatest resident set of the process while measuring",
    "peak_host_bytes_load": "greatest resident set while loading",
    "peak_host_bytes_warmup": "greatest resident set in first call and warm-up, compilation included",
}

HIDDEN = "pid_not_visible"
_BEFORE = {Phase.LOAD: "load", Phase.WARMUP: "warmup"}  # what follows is reset before it is measured


class Memory(Metric):
    name = "memory"
    columns = (
        *(Column(name=name, type="int", doc=doc) for name, doc in _ALL.items()),
        Column(name="fragmentation", type="float", doc="1 - allocated/reserved, at the peaks while measuring"),
        Column(name="kv_cache_bytes", type="int", doc="keys and values after a whole request"),
    )

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}
        self._unreset: Missing | None = None  # why the host's peak cannot be had
        self._context: int | None = None  # bytes of the process on the device before loading

    def begin(self, phase: Phase, session: Session) -> None:
        if phase is Phase.LOAD and session.on_cuda and _runtime(session):
            self._context = _context_bytes(session)
        if phase in (Phase.LOAD, Phase.FIRST_CALL, Phase.LATENCY):
            self._reset(session)

    def end(self, phase: Phase, session: Session) -> None:
        if phase in _BEFORE:
            self._found[f"peak_host_bytes_{_BEFORE[phase]}"] = self._unreset or _status_bytes("VmHWM")
            if session.on_cuda and not _runtime(session):
                self._found[f"peak_allocated_bytes_{_BEFORE[phase]}"] = _statistics()["allocated_bytes.all.peak"]
        if phase is Phase.THROUGHPUT:
            self._steady(session)

    def _reset(self, session: Session) -> None:
        self._unreset = None if reset_peaks(session) else Missing(reason="/proc/self/clear_refs cannot be written")

    def _steady(self, session: Session) -> None:
        self._found["peak_host_bytes"] = self._unreset or _status_bytes("VmHWM")
        if session.on_cuda:
            self._found |= self._grown(session) if _runtime(session) else _cuda_figures(session)
        cache_bytes = getattr(session.step, "cache_bytes", None)
        if cache_bytes is not None:
            self._found["kv_cache_bytes"] = cache_bytes()

    def _grown(self, session: Session) -> dict[str, Any]:
        process = session.gpu.process_memory_bytes(os.getpid())
        if process is None or self._context is None:
            hidden = Missing(reason=HIDDEN)
            return {"peak_process_bytes": hidden if process is None else process, "runtime_bytes": hidden}
        session.row.flag("memory_of_process")
        return {"peak_process_bytes": process, "runtime_bytes": process - self._context - _waiting_bytes(session)}

    def collect(self, session: Session) -> dict[str, Any]:
        torchs = session.on_cuda and not _runtime(session)
        if torchs and "peak_allocated_bytes" not in self._found and session.loaded is not None:
            # after an out-of-memory end: how far it came is worth knowing
            self._found |= {key: value for key, value in _cuda_figures(session).items() if key.startswith("peak_a")}
        unreached = Missing(reason="the measuring passes were not reached")
        missing = {name: self._device_reason(session) or unreached for name in (*_DEVICE_COLUMNS, "fragmentation")}
        missing |= {name: unreached for name in _ALL if name not in _DEVICE_COLUMNS}
        missing["kv_cache_bytes"] = Missing(reason="no KV cache in this workload")
        if torchs:
            missing["runtime_bytes"] = Missing(reason="PyTorch computes: see peak_allocated_bytes")
        return {**missing, **self._found}

    def _device_reason(self, session: Session) -> Missing | None:
        """Why the device's columns are null, None where it only did not come to them."""
        if not session.on_cuda:
            return Missing(reason="no accelerator: see peak_host_bytes")
        if "runtime_bytes" in self._found:
            return Missing(reason=f"{_runtime(session)} allocates for itself: see runtime_bytes")
        return None


def _runtime(session: Session) -> str:
    """The name of what runs the model in the place of PyTorch, empty where nothing does."""
    return next((technique.runtime for technique, _ in session.techniques if technique.runtime), "")


def _context_bytes(session: Session) -> int | None:
    """What the process holds on the device with PyTorch's context and nothing else.

    Makes the context, before loading is timed; others make it while they load.
    """
    import torch

    torch.empty(1, device=session.device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return session.gpu.process_memory_bytes(os.getpid())


def reset_peaks(session: Session) -> bool:
    """From here on peaks count anew; False where the kernel does not let the host's be reset."""
    import torch

    if session.on_cuda and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # pools of live CUDA graphs stay
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(session: Session) -> tuple[int | None, int]:
    """Greatest reserved on the device (None on a CPU), and greatest resident set of the process, since the reset."""
    on_host = _status_bytes("VmHWM")
    if not session.on_cuda:
        return None, on_host
    import torch

    return (torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0), on_host


def _statistics() -> dict[str, int]:
    import torch

    return dict(torch.cuda.memory_stats())


def _cuda_figures(session: Session) -> dict[str, Any]:
    stats = _statistics()
    allocated, reserved = stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.peak"]
    pools = [key for key in stats if key.startswith("reserved_bytes.private") and key.endswith("current")]
    process = session.gpu.process_memory_bytes(os.getpid())
    hidden = Missing(reason=HIDDEN)
    if stats["num_alloc_retries"]:
        session.row.flag("allocation_retries")
    waiting = _waiting_bytes(session)
    return {
        "allocated_bytes": stats["allocated_bytes.all.current"] - waiting,
        "peak_allocated_bytes": allocated - waiting,
        "peak_requested_bytes": stats["requested_bytes.all.peak"] - waiting,
        "reserved_bytes": stats["reserved_bytes.all.current"],
        "peak_reserved_bytes": reserved,
        "graph_pool_bytes": _graph_pool_bytes() if not pools else sum(stats[key] for key in pools),
        "allocation_retries": stats["num_alloc_retries"],
        "fragmentation": 1 - allocated / reserved if reserved else Missing(reason="nothing reserved"),
        "peak_process_bytes": hidden if process is None else process,
        "non_torch_bytes": hidden if process is None else process - stats["reserved_bytes.all.current"],
    }


def _waiting_bytes(session: Session) -> int:
    return session.step.waiting_bytes if session.step is not None else 0


def _graph_pool_bytes() -> int:
    """Bytes of segments that belong to private pools, from the allocator's own snapshot."""
    import torch

    segments = torch.cuda.memory_snapshot()
    return sum(int(s["total_size"]) for s in segments if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0))


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
