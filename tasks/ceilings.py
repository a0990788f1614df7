"""What a device can do at best, measured on it: memory bandwidth and matrix products, random data, sustained.

Utilisation figures divide by these, and nothing may exceed them. A datasheet's numbers are never reached, and differ
between cards of one name by their power limits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.device import DeviceInfo
from tasks.statistics import median

if TYPE_CHECKING:
    import torch

COPY = "copy_bytes_per_s"
READ = "read_bytes_per_s"
# a CPU's products of half precision may be fastest where they fit its cache
GEMM_SIZES = {"cuda": (8192,), "cpu": (512, 1024, 2048)}
SLOW_S = 0.25  # a product that would take longer than this is left to smaller sizes
MINIMUM_S = {"cuda": 0.4, "cpu": 0.3}
READINGS = 3
ROW = 4096
BUFFER_BYTES = {"cuda": 4 * 2**30, "cpu": 256 * 2**20}


def product_key(precision: str) -> str:
    """Name of the ceiling of matrix products in `fp32`, `tf32`, `fp16` or `bf16`, in FLOP per second."""
    return f"{precision}_flop_per_s"


def measure_facts(payload: dict[str, Any]) -> dict[str, Any]:
    """Ceilings of the device in `payload`, its idle power in watts or why there is none, and its power limit."""
    import torch

    from tasks.energy import idle_power
    from tasks.metric import Missing
    from tasks.nvml import open_gpu

    info = DeviceInfo.from_dict(payload["device"])
    if payload["cpus"]:
        os.sched_setaffinity(0, payload["cpus"])
        torch.set_num_threads(len(payload["cpus"]))
    gpu = open_gpu(info.uuid) if info.kind == "cuda" else None
    # before CUDA is initialised: a context raises the idle power, and the card may still be warm from the last cell
    idle = idle_power(gpu) if gpu is not None else Missing(reason="only that of a GPU that NVML reads is measured")
    return {
        "ceilings": _undisturbed(torch.device(info.kind)),
        "idle_power_w": None if isinstance(idle, Missing) else idle,
        "idle_power_missing": idle.reason if isinstance(idle, Missing) else "",
        "power_limit_w": gpu.power_limit_w() if gpu is not None else None,
    }


def _undisturbed(device: torch.device) -> dict[str, float]:
    """Ceilings, which all rows of a slot divide by: on a CPU the best of three readings, while others are at work."""
    import torch

    from tasks.interference import CpuWatch

    if device.type != "cpu":
        return measure_ceilings(device)
    best: dict[str, float] = {}
    for _ in range(READINGS):
        watch = CpuWatch(threads=torch.get_num_threads())
        watch.begin()
        reading = measure_ceilings(device)
        best = {name: max(value, best.get(name, value)) for name, value in reading.items()}
        if not watch.end().barred:
            break
    return best


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Bandwidths in bytes per second and product rates in FLOP per second, by name."""
    import torch

    kind = device.type
    free = torch.cuda.mem_get_info()[0] if kind == "cuda" else BUFFER_BYTES["cpu"] * 8
    elements = min(BUFFER_BYTES[kind], free // 8) // 4 // ROW * ROW
    ceilings = _bandwidths(device, elements)
    precisions: dict[str, tuple[torch.dtype, bool]] = {
        "fp32": (torch.float32, False),
        "fp16": (torch.float16, False),
        "bf16": (torch.bfloat16, False),
    }
    if kind == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        precisions["tf32"] = (torch.float32, True)
    for name, (dtype, tf32) in precisions.items():
        rate = _product_rate(device, dtype, tf32)
        if rate is not None:
            ceilings[product_key(name)] = rate
    return ceilings


def _bandwidths(device: torch.device, elements: int) -> dict[str, float]:
    import torch

    source = torch.randn(elements, device=device)
    nbytes = source.nbytes
    copy = 2 * nbytes / _best_s(partial(torch.empty_like(source).copy_, source), device)
    rows = source.view(-1, ROW)
    vector = torch.randn(ROW, device=device)
    # the best of several kernels that only read: a ceiling is what the memory gives, not what one kernel takes
    readers = (source.sum, rows.amax, lambda: torch.mv(rows, vector))
    read = max(nbytes / _best_s(reader, device) for reader in readers)
    return {COPY: copy, READ: max(read, copy)}


def _product_rate(device: torch.device, dtype: torch.dtype, tf32: bool) -> float | None:
    """The best rate over sizes and over both layouts of the right factor, as it is and transposed.

    Linear layers multiply with transposed weights. A CPU without instructions for half precision multiplies those 40
    times faster than others, which take minutes at the largest size.
    """
    import torch

    from tasks.optimizations._precision import set_tf32

    rates: dict[bool, float] = {}  # by layout: transposed or not
    set_tf32(tf32)
    try:
        for size in GEMM_SIZES[device.type]:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty(size, size, device=device, dtype=dtype)
            for transposed in (True, False):
                known = rates.get(transposed)
                if known is None or 2 * size**3 / known <= SLOW_S:
                    right = b.t() if transposed else b
                    rate = 2 * size**3 / _best_s(partial(torch.mm, a, right, out=out), device)
                    rates[transposed] = max(rate, known or rate)
    except RuntimeError:  # a dtype that this device cannot multiply has no ceiling
        return None
    finally:
        set_tf32(False)
    return max(rates.values())


def _best_s(call: Callable[[], Any], device: torch.device) -> float:
    """Least seconds of one call, since a ceiling is the best there is: events in blocks on CUDA, else the host clock.

    On CUDA the median of blocks over the whole time, which heat and power have settled; a CPU's calls are disturbed by
    others, never helped, so that the least is the honest figure there.
    """
    import torch

    least = MINIMUM_S[device.type]
    call()
    samples: list[float] = []
    began = time.perf_counter()
    if device.type == "cpu":
        while time.perf_counter() - began < least or len(samples) < 5:
            started = time.perf_counter()
            call()
            samples.append(time.perf_counter() - started)
        return min(samples)
    torch.cuda.synchronize()
    while time.perf_counter() - began < least or len(samples) < 5:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(4):
            call()
        stop.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(stop) / 4e3)
    return median(samples)
