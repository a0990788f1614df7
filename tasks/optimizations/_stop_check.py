"""What the techniques share that look for the end of all sequences: tokens of the plain loop, flags that were read."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Any

from tasks.optimization import Evidence, Needs, Optimization
from tasks.trace import COPY, KERNEL, traced_step
from tasks.workloads._decode_checks import NoCheck

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session
    from tasks.workloads._decode_checks import StopCheck


class StopCheckKind(Optimization):
    """One way to look. Without a stop condition in the workload it looks in vain, at the same cost."""

    family = "decode-loop"
    needs = Needs(workloads=("decode",), model_kinds=("language",))

    @abstractmethod
    def make(self, technique: Technique, session: Session) -> StopCheck:
        """The check of one session."""

    @abstractmethod
    def expected_reads(self, technique: Technique, steps: int) -> int:
        """Flags read in a request of `steps` further tokens."""

    def apply(self, technique: Technique, session: Session) -> None:
        session.settings.stop_check = lambda: self.make(technique, session)

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """The request of the plain loop, token by token, as many flags read on the way as this check must, and an end
        that only the device knows of is noticed where this check must notice it.
        """
        step: Any = session.step
        same = step.same_tokens(step.checking(NoCheck()))
        step.run(0, lambda _label: None)
        reads, steps = step.check.reads, step.steps
        facts: dict[str, Any] = {
            "check": type(step.check).__name__, "flags_read": reads, "steps": steps, "same_tokens_as_plain": same,
        }  # fmt: skip
        ended, expected = step.ended_after(1)
        facts["steps_of_an_early_end"] = ended
        ok = same and reads == self.expected_reads(technique, steps) and reads > 0 and ended == expected
        wanted = type(self.make(technique, session)).__name__
        return Evidence(ok=ok and facts["check"] == wanted and self.recognizes(session, facts), facts=facts)

    def recognizes(self, session: Session, facts: dict[str, Any]) -> bool:
        """Whether the flags came the way they should; adds what was seen to `facts`."""
        return True


def copies_of_the_check(session: Session) -> tuple[Counter[int], set[int]]:
    """Copies from device to host that a request makes only because of its check, by stream, and streams of kernels."""
    step: Any = session.step
    with step.checking(NoCheck()):
        without, _ = _copies_and_kernels(session)
    looking, kernels = _copies_and_kernels(session)
    return looking - without, kernels


def _copies_and_kernels(session: Session) -> tuple[Counter[int], set[int]]:
    events = traced_step(session, device=True)
    copies = Counter(event.stream for event in events if event.category == COPY and "memcpy dtoh" in event.name.lower())
    return copies, {event.stream for event in events if event.category == KERNEL}
