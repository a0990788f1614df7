"""No KV cache: every token runs the whole sequence again."""

from tasks.optimizations._cache import CacheKind


class NoCache(CacheKind):
    name = "no-cache"
    summary = "decode without a KV cache: the whole sequence again for every token"
    kind = "none"
    class_name = None
