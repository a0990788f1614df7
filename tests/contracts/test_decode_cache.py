"""Bytes of keys and values as they are held: growing, allocated at once, quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tasks.registry import optimizations
from tasks.row import Row
from tasks.session import Session
from tasks.stacks import parse_stack, unsupported
from tasks.workloads._decode_cache import bytes_of, stored_bytes

AXES = {"batch_size": 4, "prompt_tokens": 8, "new_tokens": 12}


class TestCacheBytes:
    def test_static_is_held_from_the_start(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("decode", "static-cache", **AXES)), calls=1) as session:
            step = session.step
            # keys and values x layers x heads x head size x 4 bytes, for every position
            assert step.cache_bytes() == 2 * 2 * 2 * 16 * 4 * AXES["batch_size"] * 20
            assert stored_bytes(step.cache) == {"cpu": step.cache_bytes()}
            address = step.cache.layers[0].keys.data_ptr()
            step.run(1, lambda _label: None)
            assert step.cache.layers[0].keys.data_ptr() == address

    def test_nothing_is_counted_twice(self) -> None:
        whole = torch.zeros(10)
        assert bytes_of([whole[:5], (whole[5:], {"scale": torch.zeros(2, dtype=torch.half)}), None, "x"]) == {"cpu": 44}

    def test_no_cache_has_none(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("decode", "no-cache", **AXES)), calls=1) as session:
            assert session.step.cache is None
            assert session.step.cache_bytes() == 0

    @pytest.mark.backends
    @pytest.mark.parametrize("stack", ["quantized-cache", "quantized-cache:bits=2", "quantized-cache:residual=4"])
    def test_quantized_is_smaller_and_says_so(self, bench: Any, stack: str) -> None:
        """Real bytes of packed numbers and scales."""
        cell = bench.cell("decode", f"fp32+{stack}", bench.POCKET, batch_size=2, prompt_tokens=64, new_tokens=8)
        plain = bench.cell("decode", "fp32+dynamic-cache", bench.POCKET, batch_size=2, prompt_tokens=64, new_tokens=8)
        with bench.live(bench.job(plain), calls=1) as session:
            full = session.step.cache_bytes()
        with bench.live(bench.job(cell), calls=1) as session:
            bits = int(parse_stack(stack).techniques[0].option("bits", 4) or 4)
            assert session.step.cache_bytes() < full * (bits + 1.5) / 32 + full * 8 / 71
            evidence = optimizations()["quantized-cache"].evidence(parse_stack(stack).techniques[0], session)
            assert evidence.ok, evidence.facts
            other = parse_stack(f"quantized-cache:bits={6 - bits}").techniques[0]
            assert not optimizations()["quantized-cache"].evidence(other, session).ok, "other bits than were stored"

    def test_quantized_compiles_before_the_cell(self, bench: Any) -> None:
        """A minute of nvcc, or half a one of gcc, once for each installation: it is not the cell's."""
        technique = optimizations()["quantized-cache"]
        for backend, device, expected in (
            ("quanto", bench.device("cuda"), "quanto cuda"),
            ("quanto", bench.device(), "quanto cpu"),
            ("hqq", bench.device("cuda"), None),
        ):
            cell = bench.cell("decode", f"fp32+quantized-cache:backend={backend}")
            chosen = cell.stack.techniques[-1]
            assert technique.kernels_to_build(chosen, bench.job(cell, device=device)) == expected

    @pytest.mark.backends
    def test_quantized_compiles_once(self, bench: Any) -> None:
        technique = optimizations()["quantized-cache"]
        job = bench.job(bench.cell("decode", "fp32+quantized-cache"))
        session = Session(job=job, device=torch.device("cpu"), row=Row())
        quanto = job.cell.stack.techniques[-1]
        first, second = (technique.build_kernels(quanto, session) for _ in range(2))
        assert 0 < second < max(first, 0.1), "what was compiled is compiled once"

    def test_quantized_refusals(self, bench: Any) -> None:
        packages = {**bench.device().packages, "optimum-quanto": "0.2.7", "hqq": "0.2.8"}
        device = bench.device(packages=packages)

        def refusal(options: str) -> str | None:
            return unsupported(bench.cell("decode", f"quantized-cache{options}"), device)

        assert refusal("") is None
        assert refusal(":backend=hqq,bits=8") is None
        assert "2 or 4 bits, not 8" in str(refusal(":bits=8"))
        assert "residual" in str(refusal(":residual=0"))
        missing = unsupported(bench.cell("decode", "quantized-cache:backend=hqq"), bench.device())
        assert "needs hqq" in str(missing)
        missing = unsupported(bench.cell("decode", "quantized-cache"), bench.device(packages={}))
        assert "optimum-quanto" in str(missing)
        assert ".[kvquant]" in str(missing)
