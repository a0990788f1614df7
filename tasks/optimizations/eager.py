"""Attention written out: scores in memory, softmax, product. Memory grows with the square of the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.optimization import Evidence, LoadOptions
from tasks.optimizations._attention import AttentionKind, attention_operators

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class Eager(AttentionKind):
    name = "eager"
    summary = "attention written out, scores in memory"

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        options.attention = "eager"

    def apply(self, technique: Technique, session: Session) -> None:
        session.settings.attention = "eager"

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        called = attention_operators(session)
        return Evidence(ok=set(called) == {"_softmax"}, facts={"attention_operators": dict(called)})
