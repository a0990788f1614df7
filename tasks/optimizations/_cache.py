"""What the KV-cache techniques share: the cache that they hand to the decode loop, and what the loop really held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tasks.optimization import Evidence, Needs, Optimization
from tasks.workloads._decode_cache import stored_bytes
from tasks.workloads._decode_steps import CachedStep, Chooser, TokenStep

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class CacheKind(Optimization):
    """One kind of KV cache. `class_name` is the object that must be alive after a request, None for none at all.

    `fixed`: made once and reset, at addresses that never change. `keeps_outputs`: a step reads what a step before has
    put out, which a CUDA graph of the step would have overwritten.
    """

    family = "kv-cache"
    needs = Needs(workloads=("decode",), model_kinds=("language",))
    class_name: ClassVar[str | None]
    fixed: ClassVar[bool] = False
    keeps_outputs: ClassVar[bool] = True

    def make_cache(self, technique: Technique, session: Session, positions: int) -> Any:
        """An empty cache of the model for `positions` tokens of each sequence."""
        raise NotImplementedError(f"{self.name} makes no cache")

    def held_share(self, technique: Technique, bytes_per_element: float) -> float:
        """Least share of the plain cache's bytes that lie on the device; for the bound at planning time."""
        return 1.0

    def apply(self, technique: Technique, session: Session) -> None:
        session.settings.token_step = lambda session, choose, positions: self.token_step(
            technique, session, choose, positions
        )

    def token_step(self, technique: Technique, session: Session, choose: Chooser, positions: int) -> TokenStep:
        """The way to the next token with this cache."""
        return CachedStep(
            session, choose, make=lambda: self.make_cache(technique, session, positions), fixed=self.fixed
        )

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        step: Any = session.step
        step.run_short()
        cache = step.cache
        name = type(cache).__name__ if cache is not None else None
        facts: dict[str, Any] = {"cache_class": name, "cache_bytes": stored_bytes(cache)}
        # the last token is generated but not fed back
        expected = session.job.cell.workload["prompt_tokens"] + step.steps
        facts["cached_tokens"] = int(cache.get_seq_length()) if cache is not None else 0
        facts["longest_input"] = getattr(step.source, "longest", 1)
        grown = facts["cached_tokens"] == expected if self.class_name else facts["longest_input"] == expected
        ok = name == self.class_name and grown and step.steps > 0
        return Evidence(ok=ok and self.recognizes(technique, cache, facts), facts=facts)

    def recognizes(self, technique: Technique, cache: Any, facts: dict[str, Any]) -> bool:
        """Whether the live cache of the right class is this one; adds what was seen to `facts`."""
        return True
