"""The same stack under another label: the A/A control that says how large a difference this machine makes up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.optimization import Evidence, Optimization

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class Again(Optimization):
    name = "again"
    family = "control"
    summary = "nothing: the same stack measured under a second label (A/A control)"

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """Nothing may have been changed on its behalf: the stack without it must be what ran."""
        rest = [str(chosen) for _, chosen in session.techniques if chosen.name != self.name]
        return Evidence(ok=True, facts={"control_of": "+".join(rest) or "baseline"})
