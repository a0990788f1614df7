from __future__ import annotations

import os
import threading

import pytest

from tasks.cores import AGAIN_S, CANDIDATES, LOOK_EVERY_S, Feeder, move_launching_threads, step_aside


class Host:
    """CPUs of known speed, and a thread that sits on the one it was moved to."""

    def __init__(self, slow: dict[int, float]) -> None:
        self.slow, self.now, self.seats = slow, 0.0, [set(os.sched_getaffinity(0))]

    def speed(self) -> float:
        (cpu,) = self.seats[-1]
        return 0.001 * self.slow.get(cpu, 1.0)

    def feeder(self) -> Feeder:
        return Feeder(speed=self.speed, move=self.seats.append, clock=lambda: self.now)


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def test_sits_on_the_fastest_and_leaves_it(eight: None) -> None:
    host = Host({cpu: 2.0 for cpu in range(8) if cpu != 5})
    feeder = host.feeder()
    with feeder.seated():
        assert host.seats[-1] == {5}
        assert feeder.to_dict() == {"cpu": 5, "choices": 1, "fastest_ms": 1.0, "slowest_ms": 2.0}
    assert host.seats[-1] == set(range(8))


def test_median_of_the_looks_of_one_pass(eight: None) -> None:
    host = Host({cpu: 2.0 for cpu in range(8) if cpu != 5})
    feeder = host.feeder()
    with feeder.seated():
        looks = feeder.looks
        assert feeder.seconds_since(looks) is None
        host.slow[5] = 1.2  # the clock falls by less than what makes it choose again
        for _ in range(3):
            host.now += LOOK_EVERY_S
            feeder.look()
        assert feeder.seconds_since(looks) == pytest.approx(0.0012)
        assert feeder.looks == looks + 3


def test_moves_when_its_cpu_has_become_slow(eight: None) -> None:
    host = Host({cpu: 2.0 for cpu in range(8) if cpu != 5})
    feeder = host.feeder()
    with feeder.seated():
        host.slow = {5: 1.8, 6: 1.9}
        feeder.look()
        assert host.seats[-1] == {5}, "it does not look at every call"
        host.now += LOOK_EVERY_S
        feeder.look()
        assert not host.seats[-1] & {5, 6}
        assert feeder.choices == 2
        moved = len(host.seats)
        host.now += LOOK_EVERY_S
        feeder.look()
        assert len(host.seats) == moved, "as fast as the fastest: it stays"


def test_waits_among_slow_ones_and_finds_the_one_that_recovers(eight: None) -> None:
    host = Host({cpu: 2.0 for cpu in range(8) if cpu != 5})
    feeder = host.feeder()
    with feeder.seated():
        host.slow = {cpu: 3.0 for cpu in range(8) if cpu != 2} | {2: 1.9}
        host.now += LOOK_EVERY_S
        feeder.look()
        assert host.seats[-1] == {2}
        host.slow = dict.fromkeys(range(8), 1.0) | {2: 2.2}
        moved = len(host.seats)
        host.now += LOOK_EVERY_S
        feeder.look()
        assert len(host.seats) == moved, "a moment ago there was no better one"
        host.now += AGAIN_S
        feeder.look()
        assert host.seats[-1] != {2}
        assert host.speed() == 0.001
    assert feeder.fastest_s == 0.001
    assert feeder.slowest_s == 0.003


def test_looks_only_while_it_sits(eight: None) -> None:
    host = Host({})
    feeder = host.feeder()
    host.now = 100.0
    feeder.look()
    assert feeder.choices == 0
    assert len(host.seats) == 1


def test_tries_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(256)))
    host = Host({})
    with host.feeder().seated():
        assert len(host.seats) == 1 + CANDIDATES + 1


def test_on_this_machine() -> None:
    allowed = os.sched_getaffinity(0)
    helper: list[set[int]] = []

    def aside() -> None:
        step_aside()
        helper.append(os.sched_getaffinity(0))

    feeder = Feeder()
    try:
        with feeder.seated():
            assert os.sched_getaffinity(0) == {feeder.cpu}
            thread = threading.Thread(target=aside)
            thread.start()
            thread.join()
        assert os.sched_getaffinity(0) == allowed
        assert helper == [allowed - {feeder.cpu} or allowed]
        assert 0 < feeder.fastest_s <= feeder.slowest_s
    finally:
        os.sched_setaffinity(0, allowed)


def test_threads_that_were_started_meanwhile_are_let_go() -> None:
    allowed, stop = os.sched_getaffinity(0), threading.Event()
    thread = threading.Thread(target=stop.wait)
    try:
        with Feeder().seated():
            thread.start()
            assert thread.native_id is not None
            assert len(os.sched_getaffinity(thread.native_id)) == 1
        assert os.sched_getaffinity(thread.native_id) == allowed
    finally:
        stop.set()
        thread.join()
        os.sched_setaffinity(0, allowed)


def test_threads_of_the_backward_pass_come_along() -> None:
    """PyTorch names them; a thread of that name is moved, one of another name is not."""
    import ctypes

    libc = ctypes.CDLL(None)
    allowed, ready, stop = os.sched_getaffinity(0), threading.Barrier(3), threading.Event()
    ids: dict[str, int] = {}

    def wait(name: str) -> None:
        libc.prctl(15, name.encode(), 0, 0, 0)  # PR_SET_NAME
        ids[name] = threading.get_native_id()
        ready.wait()
        stop.wait()

    threads = [threading.Thread(target=wait, args=(name,)) for name in ("pt_autograd_0", "other")]
    for thread in threads:
        thread.start()
    ready.wait()
    try:
        move_launching_threads({min(allowed)})
        assert os.sched_getaffinity(ids["pt_autograd_0"]) == {min(allowed)}
        assert os.sched_getaffinity(ids["other"]) == allowed
    finally:
        move_launching_threads(allowed)
        stop.set()
        for thread in threads:
            thread.join()
