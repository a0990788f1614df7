"""Memory-efficient attention (xFormers' algorithm), CUDA only, fp32 too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.optimization import Needs
from tasks.optimizations._attention import SdpaBackend

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class SdpaEfficient(SdpaBackend):
    name = "sdpa-efficient"
    summary = "scaled_dot_product_attention, memory-efficient backend"
    needs = Needs(devices=("cuda",))
    backend = "EFFICIENT_ATTENTION"
    operators = ("_scaled_dot_product_efficient_attention",)

    @contextmanager
    def context(self, technique: Technique, session: Session) -> Iterator[None]:
        with super().context(technique, session), _keys_repeated():
            yield


@contextmanager
def _keys_repeated() -> Iterator[None]:
    """Grouped-query models repeat keys and values: this backend has no kernel for groups, transformers assumes one."""
    from transformers.integrations import sdpa_attention

    asked = sdpa_attention.use_gqa_in_sdpa

    def never(*_: Any) -> bool:
        return False

    sdpa_attention.use_gqa_in_sdpa = never
    try:
        yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = asked
