"""How long a cell's runs will take, before anything has run: passes, calls that are longer than those, and the rest.

Seconds as seen in the rows of `docs/results` on an H200 and on two CPU cores; what a sweep has measured itself is the
better forecast as soon as there is some.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.cell import NO_MODEL
from tasks.footprint import lower_bound, parameters
from tasks.models.identity import config_of
from tasks.registry import optimizations

if TYPE_CHECKING:
    from tasks.cell import Cell, ModelSpec
    from tasks.device import DeviceInfo
    from tasks.job import Profile

OVERHEAD_S = 2.0  # process, load, evidence
COMPILE_COLD_S, COMPILE_WARM_S, TUNING_S = 20.0, 8.0, 50.0
QUALITY_S = {"cuda": 5.0, "cpu": 1.0}
REQUESTS = 9  # the first, the warm-up's and those of the passes, at the least
# An eager step launches a layer's kernels one by one, and compressed layers have more of them; a compiled one does not.
LAYER_S = {"cuda": 0.6e-3, "cpu": 0.4e-3}
COMPRESSED, COMPILED = 2.5, 0.4
BYTES_PER_S = {"cuda": 2e12, "cpu": 1e10}
FLOP_PER_S = {"cuda": 1e14, "cpu": 1e11}
FETCHED_PER_S = 1e10  # from the host, where layers are offloaded
LAYERS, WIDTH = 12, 768  # of a model whose configuration is not at hand, or leaves them to its class


def run_seconds(cell: Cell, device: DeviceInfo, profile: Profile, *, judged: bool, cold: bool) -> float:
    """Seconds of one run of the cell, quality `judged` in it or not, the compiler's cache `cold` or not.

    What is made once for several cells (quantizing, training a student) is not in it.
    """
    kind = "cuda" if device.kind == "cuda" else "cpu"
    seconds = OVERHEAD_S + profile.warmup_min_s + profile.latency_s + profile.throughput_s
    if kind == "cuda":
        seconds += profile.device_s + profile.energy_window_s * profile.energy_windows
    seconds += REQUESTS * _request_seconds(cell, kind)
    if "compile" in _families(cell):
        seconds += (COMPILE_COLD_S + TUNING_S * _tuned(cell)) if cold else COMPILE_WARM_S
    return seconds + (QUALITY_S[kind] if judged and cell.model != NO_MODEL else 0.0)


def _families(cell: Cell) -> set[str]:
    return {optimizations()[name].family for name in cell.stack.names()}


def _tuned(cell: Cell) -> bool:
    """Whether the compiler tries block sizes, which takes it longer than all the rest."""
    return any(item.option("coordinate_descent") for item in cell.stack.techniques)


def _request_seconds(cell: Cell, kind: str) -> float:
    """One request or call of a language model; those of others, and kernels, are short beside the passes."""
    tokens, prompt = cell.workload.get("new_tokens"), _prompt_seconds(cell, kind)
    if tokens is None:
        return prompt
    families, bytes_read = _families(cell), lower_bound(cell).total_bytes
    step = _layers(cell.model) * LAYER_S[kind]
    if "compression" in families:
        step *= COMPRESSED
    if "compile" in families or "cuda-graph" in cell.stack.names():
        step *= COMPILED
    step += bytes_read / BYTES_PER_S[kind]
    if "offload" in families:
        known = optimizations()
        kept = math.prod(known[item.name].resident(item) for item in cell.stack.techniques)
        step += (1 - kept) * bytes_read / max(kept, 0.05) / FETCHED_PER_S
    return float(prompt + tokens * step)


def _prompt_seconds(cell: Cell, kind: str) -> float:
    """The products of the tokens that are there at once, causal attention among them; training takes three times it."""
    count = parameters(cell.model) if cell.model != NO_MODEL else None
    length = cell.workload.get("prompt_tokens", cell.workload.get("sequence_length", 0))
    if not count or not length:
        return 0.0
    products = 2 * count * length + 2 * _layers(cell.model) * _width(cell.model) * length**2
    passes = 3 if cell.workload.kind == "train_step" else 1
    return float(passes * cell.workload.get("batch_size", 1) * products / FLOP_PER_S[kind])


def _layers(model: ModelSpec) -> int:
    config = _config(model)
    return int(config.get("num_hidden_layers") or config.get("n_layer") or LAYERS)


def _width(model: ModelSpec) -> int:
    config = _config(model)
    return int(config.get("hidden_size") or config.get("n_embd") or WIDTH)


@cache
def _config(model: ModelSpec) -> dict[str, Any]:
    try:
        return config_of(model) or {}
    except (OSError, ValueError):
        return {}
