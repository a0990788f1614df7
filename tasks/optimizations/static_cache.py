"""A cache allocated once at its full length: fixed addresses, which compiled steps and CUDA graphs need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.optimizations._cache import CacheKind

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class StaticCacheKind(CacheKind):
    name = "static-cache"
    summary = "KV cache allocated once at full length"
    class_name = "StaticCache"
    fixed = True
    keeps_outputs = False

    def make_cache(self, technique: Technique, session: Session, positions: int) -> Any:
        from transformers import StaticCache

        return StaticCache(config=session.model.config, max_cache_len=positions)
