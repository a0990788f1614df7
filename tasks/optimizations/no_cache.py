"""No KV cache: every token runs the whole sequence again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.optimizations._cache import CacheKind
from tasks.workloads._decode_steps import Chooser, RecomputedStep, TokenStep

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class NoCache(CacheKind):
    name = "no-cache"
    summary = "decode without a KV cache: the whole sequence again for every token"
    class_name = None
    keeps_outputs = False  # only token ids, and they are copied

    def held_share(self, technique: Technique, bytes_per_element: float) -> float:
        return 0.0

    def token_step(self, technique: Technique, session: Session, choose: Chooser, positions: int) -> TokenStep:
        return RecomputedStep(session, choose)
