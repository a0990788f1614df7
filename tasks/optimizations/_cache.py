"""What the KV-cache techniques share: the kind of cache, and what the decode loop really held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tasks.optimization import Evidence, Needs, Optimization
from tasks.workloads.decode import SHORT_TOKENS

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class CacheKind(Optimization):
    """`kind` is what the decode loop is told; `class_name` the cache object that must be alive after a request."""

    family = "kv-cache"
    needs = Needs(workloads=("decode",), model_kinds=("language",))
    kind: ClassVar[str]
    class_name: ClassVar[str | None]

    def apply(self, technique: Technique, session: Session) -> None:
        session.settings.cache = self.kind

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        step: Any = session.step
        step.run_short()
        name = type(step.cache).__name__ if step.cache is not None else None
        point = session.job.cell.workload
        facts: dict[str, Any] = {"cache_class": name, "cache_bytes": step.cache_bytes()}
        # the last token is generated but not fed back
        expected = point["prompt_tokens"] + min(point["new_tokens"], SHORT_TOKENS) - 1
        facts["cached_tokens"] = int(step.cache.get_seq_length()) if step.cache is not None else 0
        facts["longest_input"] = getattr(step, "longest", 1)
        grown = facts["cached_tokens"] == expected if self.class_name else facts["longest_input"] == expected
        return Evidence(ok=name == self.class_name and grown, facts=facts)
