"""Keys and values wait in host memory; each layer's are fetched on a second stream while the layer before computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.optimization import Evidence, Needs
from tasks.optimizations._cache import CacheKind
from tasks.workloads._decode_compared import TIE, furthest

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class OffloadedCacheKind(CacheKind):
    name = "offloaded-cache"
    summary = "KV cache in host memory, layers fetched ahead of their use"
    needs = Needs(devices=("cuda",), workloads=("decode",), model_kinds=("language",))
    class_name = "OrderedCache"

    def make_cache(self, technique: Technique, session: Session, positions: int) -> Any:
        return _ordered_cache()(config=session.model.config, offloading=True)

    def held_share(self, technique: Technique, bytes_per_element: float) -> float:
        return 0.0

    def recognizes(self, technique: Technique, cache: Any, facts: dict[str, Any]) -> bool:
        """All layers but the one in use and the one fetched ahead must lie on the host."""
        places = [layer.keys.device.type for layer in cache.layers]
        facts["layers_on_host"], facts["layers"] = places.count("cpu"), len(places)
        return bool(cache.offloading) and places.count("cpu") >= max(len(places) - 2, 1)

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """The tokens too: what is fetched too early, or overwritten, are other keys and values."""
        found = super().evidence(technique, session)
        if not found.ok:
            return found
        distance = furthest(session.step, waiting())  # type: ignore[arg-type]
        facts = {**found.facts, "from_the_best_score": distance if math.isfinite(distance) else None}
        return Evidence(ok=distance <= TIE, facts=facts)


@cache
def _ordered_cache() -> type[Any]:
    """transformers' class, in which fetching waits for what has been launched before.

    Up to 5.17 at least it does not (5.23 does): a device behind its host then reads keys and values that are still on
    their way to the host, and memory that the last layer still reads. What is launched later runs beside the fetching.
    """
    import torch
    from transformers import DynamicCache

    class OrderedCache(DynamicCache):  # type: ignore[misc]
        waits: ClassVar[bool] = False  # whether the host waits too, before and after each fetching

        def prefetch(self, *layer: Any, **keywords: Any) -> None:
            if self.waits:
                torch.cuda.synchronize()
            self.prefetch_stream.wait_stream(torch.cuda.current_stream())
            super().prefetch(*layer, **keywords)
            if self.waits:
                torch.cuda.synchronize()

    return OrderedCache


@contextmanager
def waiting() -> Iterator[None]:
    """Nothing runs beside the fetching of keys and values, which therefore cannot be too early or too late."""
    kind = _ordered_cache()
    kind.waits = True
    try:
        yield
    finally:
        kind.waits = False
