"""transformers' default cache: grows by concatenation with every token."""

from tasks.optimizations._cache import CacheKind


class DynamicCacheKind(CacheKind):
    name = "dynamic-cache"
    summary = "KV cache that grows by concatenation (transformers' default)"
    kind = "dynamic"
    class_name = "DynamicCache"
