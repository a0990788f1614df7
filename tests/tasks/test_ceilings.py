"""What a device can do at best: sizes and layouts of the products that are tried."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tasks import ceilings

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, bool], float]], list[tuple[int, bool]]]:
    """Products take what a rule says, FLOP per second by size and layout; returns the list of those that were tried."""

    def rule(rate: Callable[[int, bool], float]) -> list[tuple[int, bool]]:
        tried: list[tuple[int, bool]] = []

        def seconds(call: Any, _device: torch.device) -> float:
            left, right = call.args
            assert torch.allclose(call(), left @ right)  # it is the product that is timed
            size, transposed = len(left), not right.is_contiguous()
            tried.append((size, transposed))
            return 2 * size**3 / rate(size, transposed)

        monkeypatch.setattr(ceilings, "_best_s", seconds)
        return tried

    return rule


def test_best_size_and_layout_is_the_ceiling(clock: Any) -> None:
    tried = clock(lambda size, transposed: 1e12 if (size, transposed) == (1024, False) else 5e11)
    assert ceilings._product_rate(CPU, torch.float32, tf32=False) == pytest.approx(1e12)
    assert len(tried) == 2 * len(ceilings.GEMM_SIZES["cpu"])


def test_slow_layout_is_left_to_small_sizes(clock: Any) -> None:
    """Half precision on a CPU without instructions for it: minutes at the largest size, seconds transposed."""
    tried = clock(lambda _size, transposed: 4.6e10 if transposed else 1e9)
    assert ceilings._product_rate(CPU, torch.float32, tf32=False) == pytest.approx(4.6e10)
    assert tried == [(512, True), (512, False), (1024, True)]


def test_no_rate_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_call: Any, _device: torch.device) -> float:
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(ceilings, "_best_s", refuse)
    assert ceilings._product_rate(CPU, torch.float16, tf32=False) is None


@pytest.mark.parametrize(("barred", "readings"), [([False], 1), ([True, False], 2), ([True] * 5, ceilings.READINGS)])
def test_a_busy_cpu_is_read_again_and_the_best_counts(
    monkeypatch: pytest.MonkeyPatch, barred: list[bool], readings: int
) -> None:
    from tasks.interference import CpuWatch

    rates, disturbed = iter((1.0, 3.0, 2.0)), iter(barred)
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device: {"fp32_flop_per_s": next(rates)})
    monkeypatch.setattr(CpuWatch, "begin", lambda self: None)
    monkeypatch.setattr(CpuWatch, "end", lambda self: SimpleNamespace(barred=next(disturbed)))
    assert ceilings._undisturbed(CPU) == {"fp32_flop_per_s": max((1.0, 3.0, 2.0)[:readings])}
    assert len(list(rates)) == 3 - readings


def test_linear_layers_are_not_above_their_ceiling() -> None:
    """The measured rate, on this machine, of what models are made of: a factor of two would be another kernel."""
    x, weight = torch.randn(512, 512).half(), torch.randn(512, 512).half()
    for last in (False, False, True):  # a machine that others use may slow down between the two
        seconds = ceilings._best_s(lambda: torch.nn.functional.linear(x, weight), CPU)
        rate = ceilings._product_rate(CPU, torch.float16, tf32=False)
        assert rate is not None
        if last or 2 * 512**3 / seconds < 2 * rate:
            break
    assert 2 * 512**3 / seconds < 2 * rate
