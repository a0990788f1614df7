"""A cache allocated once at its full length: fixed addresses, which compiled steps and CUDA graphs need."""

from tasks.optimizations._cache import CacheKind


class StaticCacheKind(CacheKind):
    name = "static-cache"
    summary = "KV cache allocated once at full length"
    kind = "static"
    class_name = "StaticCache"
