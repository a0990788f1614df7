"""transformers' default cache: grows by concatenation with every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.optimizations._cache import CacheKind

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class DynamicCacheKind(CacheKind):
    name = "dynamic-cache"
    summary = "KV cache that grows by concatenation (transformers' default)"
    class_name = "DynamicCache"

    def make_cache(self, technique: Technique, session: Session, positions: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=session.model.config)

    def recognizes(self, technique: Technique, cache: Any, facts: dict[str, Any]) -> bool:
        facts["offloading"] = bool(cache.offloading)
        return not cache.offloading
