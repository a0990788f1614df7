"""Keys and values wait in host memory; each layer's are fetched on a second stream while the layer before computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.optimization import Needs
from tasks.optimizations._cache import CacheKind

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class OffloadedCacheKind(CacheKind):
    name = "offloaded-cache"
    summary = "KV cache in host memory, layers fetched ahead of their use"
    needs = Needs(devices=("cuda",), workloads=("decode",), model_kinds=("language",))
    class_name = "DynamicCache"

    def make_cache(self, technique: Technique, session: Session, positions: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=session.model.config, offloading=True)

    def held_share(self, technique: Technique, bytes_per_element: float) -> float:
        return 0.0

    def recognizes(self, technique: Technique, cache: Any, facts: dict[str, Any]) -> bool:
        """All layers but the one in use and the one fetched ahead must lie on the host."""
        places = [layer.keys.device.type for layer in cache.layers]
        facts["layers_on_host"], facts["layers"] = places.count("cpu"), len(places)
        return bool(cache.offloading) and places.count("cpu") >= max(len(places) - 2, 1)
