"""Artifacts reach other nodes: the exchange by itself, and two real nodes with stores of their own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.exchange import Exchange
from orchestrator.slots import DISTURBED_S, limit_s

SWEEP = """
name: shared
models: [pocket]
workloads: [{kind: prefill, batch_size: 1, sequence_length: 16}]
optimizations: [baseline, "%s"]
hardware: [a100, rtx3090]
rounds: 1
quality: false
"""


QUICK = "prune:importance=magnitude"
SLOW = "prune:importance=magnitude,recover_steps=12"


class TestExchange:
    """Slots are `node/pid`."""

    def test_the_first_makes_and_the_others_wait_and_fetch(self) -> None:
        exchange = Exchange()
        assert exchange.claim("k", "a/1", 100.0)[0] == "make"
        assert exchange.claim("k", "b/1", 100.0)[0] == "wait"
        assert exchange.claim("k", "a/2", 100.0)[0] == "wait", "it finds what the other slot of its node has made"
        assert exchange.claim("k", "a/1", 100.0)[0] == "make", "asked twice"
        assert exchange.claim("other", "b/1", 100.0)[0] == "make"
        assert exchange.keep("k", "a/1", "courier of a") == 1, "b waits; a/2 has it already"
        assert exchange.claim("k", "b/1", 100.0) == ("fetch", "a", "courier of a")

    def test_a_holder_sends_to_one_at_a_time_and_receivers_become_holders(self) -> None:
        exchange = Exchange()
        exchange.keep("k", "a/1", "courier of a")
        assert exchange.claim("k", "b/1", 100.0)[0] == "fetch"
        assert exchange.claim("k", "c/1", 100.0)[0] == "wait"
        assert exchange.keep("k", "b/1", "courier of b") == 1
        fetched = {exchange.claim("k", slot, 100.0)[:2] for slot in ("c/1", "d/1")}
        assert fetched == {("fetch", "a"), ("fetch", "b")}
        assert exchange.claim("k", "e/1", 100.0)[0] == "wait"
        exchange.drop("k", "a")
        exchange.keep("k", "d/1", "courier of d")
        assert exchange.claim("k", "e/1", 100.0)[0] == "fetch"

    def test_a_receiver_that_is_lost_blocks_its_holder_for_a_while_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        exchange, now = Exchange(), [0.0]
        monkeypatch.setattr("orchestrator.exchange.time.monotonic", lambda: now[0])
        exchange.keep("k", "a/1", "courier")
        exchange.claim("k", "b/1", 10.0)
        assert exchange.claim("k", "c/1", 10.0)[0] == "wait"
        now[0] = 11.0
        assert exchange.claim("k", "c/1", 10.0)[0] == "fetch"
        exchange.forget("c/1")
        assert exchange.claim("k", "d/1", 10.0)[0] == "fetch"

    def test_one_slot_of_a_node_receives_for_both(self) -> None:
        exchange = Exchange()
        exchange.keep("k", "a/1", "courier of a")
        exchange.keep("k", "b/1", "courier of b")
        assert exchange.claim("k", "c/1", 100.0)[0] == "fetch"
        assert exchange.claim("k", "c/2", 100.0)[0] == "wait"
        exchange.release("k", "c/1")
        assert exchange.claim("k", "c/2", 100.0)[0] == "fetch"

    def test_after_a_failure_all_others_try_for_themselves(self) -> None:
        exchange = Exchange()
        exchange.claim("k", "small/1", 100.0)
        assert exchange.claim("k", "large/1", 100.0)[0] == "wait"
        exchange.fail("k", "small/1")
        assert exchange.claim("k", "small/1", 100.0, able=False)[0] == "wait", "large asks again in a second"
        assert exchange.claim("k", "large/1", 100.0)[0] == "make"
        assert exchange.claim("k", "larger/1", 100.0)[0] == "make", "nobody waits for one who may fail as well"
        assert exchange.claim("k", "small/1", 100.0)[0] == "wait", "but who has failed does"
        exchange.fail("k", "large/1")
        exchange.fail("k", "larger/1")
        assert exchange.claim("k", "small/1", 100.0)[0] == "lack"

    def test_who_failed_before_others_came_is_waited_for_by_nobody(self) -> None:
        exchange = Exchange()
        exchange.claim("k", "small/1", 100.0)
        exchange.fail("k", "small/1")
        assert exchange.claim("k", "small/1", 100.0)[0] == "lack", "so its host makes it, which may take long"
        assert exchange.claim("k", "large/1", 100.0)[0] == "make"
        exchange.keep("k", "small/1", "courier")
        assert exchange.claim("k", "late/1", 100.0)[:2] == ("fetch", "small")

    def test_who_is_not_able_takes_what_there_is(self) -> None:
        exchange = Exchange()
        assert exchange.claim("k", "small/1", 100.0, able=False)[0] == "lack"
        assert exchange.claim("k", "large/1", 100.0)[0] == "make"
        assert exchange.claim("k", "small/1", 100.0, able=False)[0] == "wait"
        exchange.keep("k", "large/1", "courier")
        assert exchange.claim("k", "small/1", 100.0, able=False)[:2] == ("fetch", "large")

    def test_two_that_are_not_able_do_not_wait_for_each_other(self) -> None:
        exchange = Exchange()
        exchange.claim("k", "large/1", 100.0)
        for slot in ("small/1", "small/2"):
            assert exchange.claim("k", slot, 100.0, able=False)[0] == "wait"
        exchange.fail("k", "large/1")
        for slot in ("small/1", "small/2"):
            assert exchange.claim("k", slot, 100.0, able=False)[0] == "lack"

    def test_who_waited_long_ago_waits_no_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        exchange, now = Exchange(), [0.0]
        monkeypatch.setattr("orchestrator.exchange.time.monotonic", lambda: now[0])
        exchange.claim("k", "a/1", 100.0)
        exchange.claim("k", "b/1", 100.0)
        now[0] = 60.0
        exchange.claim("k", "c/1", 100.0)
        now[0] = 61.0
        assert exchange.keep("k", "a/1", "courier") == 1

    def test_a_holder_that_lost_it_is_not_asked_again(self) -> None:
        exchange = Exchange()
        exchange.keep("k", "a/1", "courier")
        exchange.drop("k", "a")
        assert exchange.claim("k", "b/1", 100.0)[0] == "make"
        exchange.drop("never heard of", "a")

    def test_a_lost_runner_holds_and_makes_nothing(self) -> None:
        exchange = Exchange()
        exchange.keep("held", "a/1", "courier")
        exchange.claim("made", "a/1", 100.0)
        exchange.claim("elsewhere", "b/1", 100.0)
        exchange.keep("other", "a/2", "courier of its neighbour")
        exchange.forget("a/1")
        assert exchange.claim("held", "c/1", 100.0)[0] == exchange.claim("made", "c/1", 100.0)[0] == "make"
        assert exchange.claim("other", "c/1", 100.0)[0] == "fetch"
        assert exchange.claim("elsewhere", "c/1", 100.0)[0] == "wait"

    def test_a_promise_to_make_it_ends(self) -> None:
        exchange = Exchange()
        exchange.claim("k", "a/1", 0.0)
        assert exchange.claim("k", "b/1", 100.0)[0] == "make"


def test_a_run_may_wait_for_other_nodes(bench: Any) -> None:
    job = bench.job(bench.cell("prefill", "prune", bench.POCKET), timeout_s=100.0, artifact_timeout_s=1000.0)
    assert limit_s(job) == 1100.0 + DISTURBED_S
    assert limit_s(job, shared=True) == 2100.0 + DISTURBED_S
    compiled = dataclasses.replace(job, cell=bench.cell("prefill", "gptq", bench.POCKET))
    assert limit_s(compiled) == 2100.0 + DISTURBED_S, "its kernel may have to be compiled"
    judged = dataclasses.replace(job, quality=True)
    assert (limit_s(judged), limit_s(judged, shared=True)) == (1200.0 + DISTURBED_S, 2300.0 + DISTURBED_S)
    on_a_card = dataclasses.replace(judged, device=bench.device("cuda"))
    assert limit_s(on_a_card) == 1300.0 + DISTURBED_S, "its host may have to make the reference after it"
    trained = bench.cell("train_step", "prune", bench.POCKET)
    assert limit_s(dataclasses.replace(judged, cell=trained)) == 1100.0 + DISTURBED_S, "nothing is judged"


@pytest.fixture
def stores(tmp_path: Path, cluster: Any) -> Iterator[list[tuple[Any, Path]]]:
    """Two nodes with caches of their own."""
    nodes = []
    for tag in ("a100", "rtx3090"):
        folder = tmp_path / tag
        nodes.append((cluster.add(tag, env_vars={"XDG_CACHE_HOME": str(folder)}), folder))
    yield nodes
    for node, _ in nodes:
        cluster.kill(node)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_made_on_one_node_and_used_on_both(
    cluster: Any, stores: list[tuple[Any, Path]], command: Any, sweep_file: Any, tmp_path: Path, tools: Any
) -> None:
    judged = (SWEEP % QUICK).replace("quality: false", "quality: {tokens: 1024, choices: 10}")
    process = command("run", sweep_file(judged), "--out", tmp_path / "out", "--address", cluster.address, "--json")
    stdout, stderr = process.communicate(timeout=800)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["outcomes"] == {"ok": 4}
    rows = [record["row"] for record in tools.journal(tmp_path / "out", "row")]
    pruned = [row for row in rows if row["optimization"] == QUICK]
    assert {row["hardware"] for row in pruned} == {"a100", "rtx3090"}
    assert len({row["artifact_key"] for row in pruned}) == 1
    assert sorted(row["artifact_reused"] for row in pruned) == [False, True]
    assert all(row["kl_divergence"] is not None for row in rows)
    assert len({row["quality_reference"] for row in rows}) == 1
    for maker in ("prune", "reference"):
        manifests = [list(store.rglob(f"{maker}/*/manifest.json")) for _, store in stores]
        assert [len(found) for found in manifests] == [1, 1]
        assert manifests[0][0].read_bytes() == manifests[1][0].read_bytes(), "one was made, the other is its copy"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_maker_that_is_lost_leaves_it_to_who_waits(
    cluster: Any, stores: list[tuple[Any, Path]], command: Any, sweep_file: Any, tmp_path: Path, tools: Any
) -> None:
    process = command(
        "run", sweep_file(SWEEP % SLOW), "--out", tmp_path / "out", "--address", cluster.address, "--json"
    )

    def making() -> list[int]:
        return [number for number, (_, store) in enumerate(stores) if list(store.rglob("prune/.*.making"))]

    (maker,) = tools.wait_for(making, 300, "one node making it", process)
    cluster.kill(stores.pop(maker)[0])
    ((_, other),) = stores
    _, stderr = process.communicate(timeout=500)
    assert process.returncode == 1, stderr  # nobody else has the tag of the node that was lost
    assert len(list(other.rglob("prune/*/manifest.json"))) == 1
    tag = other.name
    rows = [record["row"] for record in tools.journal(tmp_path / "out", "row") if record["row"]["hardware"] == tag]
    assert [row["outcome"] for row in rows] == ["ok", "ok"]
