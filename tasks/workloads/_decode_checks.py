"""How the host learns that every sequence of a batch has ended. Ways to look are techniques; not looking is here."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.session import Session
    from tasks.workloads._decode_ledger import Ledger


class StopCheck(ABC):
    """`issued` is asked after every token's work was handed to the device; columns count from 0, the first token.

    Attributes: `watches` (the device must work out whether all have ended), `reads` (flags read in this request) and
    `waited_s` (host time spent for them, in this request).
    """

    watches = True

    def __init__(self) -> None:
        self.reads = 0
        self.waited_s = 0.0

    def flags(self, session: Session, new_tokens: int) -> Any:
        """What the device writes one flag per column to; None if the status of the last step is enough."""
        return None

    def begin(self, ledger: Ledger) -> None:
        """Before a request, after the ledger's own `begin`."""
        self._ledger, self.reads, self.waited_s = ledger, 0, 0.0

    @abstractmethod
    def issued(self, column: int) -> bool:
        """Whether the request is known to be over, now that the token of `column` has been issued."""

    @abstractmethod
    def last_column(self, needed: int) -> int:
        """The column after which the loop ends if `needed` is the last one that has a real token."""


class NoCheck(StopCheck):
    """Runs to the limit, whatever has ended: the plain loop."""

    watches = False

    def issued(self, column: int) -> bool:
        return False

    def last_column(self, needed: int) -> int:
        return 2**31


class SyncCheck(StopCheck):
    """Reads the status of every `every`-th step as soon as it was issued, and so waits for the device each time."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self._every = every

    def issued(self, column: int) -> bool:
        if column % self._every:
            return False
        began = time.perf_counter()
        over = int(self._ledger.status.item()) == self._ledger.epoch + 1
        self.waited_s += time.perf_counter() - began
        self.reads += 1
        return over

    def last_column(self, needed: int) -> int:
        return -(-needed // self._every) * self._every


class LateCheck(StopCheck):
    """Reads the flag of the column before while the device works on the next: one step may be too many.

    That step changes nothing: sequences that have ended are padded, and padding is what would stand there.
    """

    def issued(self, column: int) -> bool:
        self.send(column)
        if column == 0:
            return False
        began = time.perf_counter()
        value = self.receive(column - 1)
        self.waited_s += time.perf_counter() - began
        self.reads += 1
        return value == self._ledger.epoch + 1

    def last_column(self, needed: int) -> int:
        return needed + 1

    def send(self, column: int) -> None:
        """Start the flag of `column` on its way to the host, if the device has not done that itself."""

    @abstractmethod
    def receive(self, column: int) -> int:
        """Wait until the flag of `column` is here, and return it."""
