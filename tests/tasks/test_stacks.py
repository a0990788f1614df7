"""Parsing of stacks: canonical order, options with types, and errors that name the nearest word."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.cell import Stack
from tasks.stacks import StackError, option, parse_stack, precision_of, unsupported


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("baseline", "baseline"),
        (" baseline ", "baseline"),
        ("compile+sdpa-flash+bf16", "bf16+sdpa-flash+compile"),
        ("static-cache + eager + fp16", "fp16+eager+static-cache"),
        ("compile:mode=default", "compile"),
        ("compile:mode=max-autotune+bf16", "bf16+compile:mode=max-autotune"),
        ("nf4+bf16", "bf16+nf4"),
    ],
)
def test_canonical_form(text: str, canonical: str) -> None:
    assert str(parse_stack(text)) == canonical


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bf61", "unknown optimization 'bf61'.*did you mean 'bf16'"),
        ("zzz", "unknown optimization 'zzz'; known: baseline"),
        ("bf16+fp16", "'bf16' and 'fp16' are both of the family 'precision'"),
        ("bf16+bf16", "both of the family"),
        ("bf16+baseline", "'baseline' is the empty stack and cannot be combined"),
        ("bf16+", "unknown optimization ''"),
        ("", "unknown optimization ''"),
        ("bf16:mode=x", "'bf16' takes no options, got 'mode'"),
        ("compile:mod=default", "unknown option 'mod' of 'compile'; did you mean 'mode'"),
        ("compile:mode", "option 'mode' of 'compile' is not key=value"),
        ("compile:mode=fast", "option 'mode' of 'compile' cannot be 'fast'"),
        ("compile:mode=default,mode=default", "option 'mode' of 'compile' is given twice"),
    ],
)
def test_errors_name_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(StackError, match=said):
        parse_stack(text)


def test_empty_stack_is_the_model_as_published() -> None:
    assert parse_stack("baseline") == Stack()


def test_option_or_its_default() -> None:
    (default,) = parse_stack("compile").techniques
    (chosen,) = parse_stack("compile:mode=reduce-overhead").techniques
    assert option(default, "mode") == "default"
    assert option(chosen, "mode") == "reduce-overhead"


def test_precision_of(bench: Any) -> None:
    assert precision_of(bench.cell("prefill", "eager+fp16")) == "fp16"
    assert precision_of(bench.cell("prefill", "eager")) is None


def test_first_reason_is_told(bench: Any) -> None:
    """The workload's own refusal comes before the techniques'."""
    reason = unsupported(bench.cell("decode", "tf32", new_tokens=1), bench.device())
    assert reason
    assert reason.startswith("decode needs")
    assert "tf32 needs cuda" in str(unsupported(bench.cell("decode", "tf32"), bench.device()))
    assert unsupported(bench.cell("decode", "tf32"), bench.device("cuda")) is None


@pytest.mark.parametrize("stack", ["fp32+sdpa-flash", "tf32+sdpa-flash", "fp32+sdpa-cudnn"])
def test_half_precision_kernels_refuse_fp32_on_cuda(bench: Any, stack: str) -> None:
    reason = unsupported(bench.cell("prefill", stack), bench.device("cuda"))
    assert reason
    assert "needs fp16 or bf16, the stack has" in reason
