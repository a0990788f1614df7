"""Handing a job to a job server that is not ready: what Ray's client raises then, without a cluster."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from orchestrator import submit as module
from orchestrator.submit import Submission, SubmitError, run_job

NO_AGENT = "No available agent to submit job, please try again later."


class Server:
    """Refuses so many times with this text."""

    def __init__(self, text: str, times: float) -> None:
        self.text, self.times, self.asked = text, times, 0

    def submit_job(self, **_: Any) -> None:
        self.asked += 1
        if self.asked <= self.times:
            raise RuntimeError(f"Request failed with status code 500: {self.text}")

    def list_jobs(self) -> list[Any]:
        return []


@pytest.fixture
def hand_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hands a job to the server, on a clock that goes on by what is slept; returns what the person was told."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def hand(server: Server) -> str:
        told = io.StringIO()
        run_job(server, "true", tmp_path, told, address="http://there:8265", job_id="one", metadata={})
        return told.getvalue()

    return hand


def test_a_head_that_is_still_starting_is_waited_for(hand_over: Any) -> None:
    server = Server(NO_AGENT, 3)
    assert hand_over(server) == "http://there:8265 cannot start jobs yet: waiting for it, two minutes at most\n"
    assert server.asked == 4
    assert hand_over(Server(NO_AGENT, 0)) == ""


def test_but_not_for_ever(hand_over: Any) -> None:
    server = Server(NO_AGENT, float("inf"))
    with pytest.raises(SubmitError, match=r"8265 did not take the job: RuntimeError: .*No available agent"):
        hand_over(server)
    assert 120 <= server.asked <= 123


def test_nor_for_anything_else(hand_over: Any) -> None:
    server = Server("disk full", 1)
    with pytest.raises(SubmitError, match=r"did not take the job: RuntimeError: .* 500: disk full"):
        hand_over(server)
    assert server.asked == 1


def test_of_two_submits_at_once_the_later_follows_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        entry = "sweep.yaml"
        digest = "0"

        def write(self, folder: Path) -> None:
            pass

    submission = Submission(staged=Nothing(), out="/out", address="http://there:8265")  # type: ignore[arg-type]
    taken = Server("a job with the submission_id one already exists", 1)
    monkeypatch.setattr(module, "_running", lambda *_: "the-first")
    assert module._start(taken, submission, io.StringIO()) == "the-first"
    monkeypatch.setattr(module, "_running", lambda *_: None)
    with pytest.raises(SubmitError, match="already exists"):
        module._start(Server(taken.text, 1), submission, io.StringIO())
