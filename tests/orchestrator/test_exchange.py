"""Artifacts reach other nodes: the exchange by itself, and two real nodes with stores of their own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.exchange import Exchange
from orchestrator.slots import limit_s

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
    def test_the_first_makes_and_the_others_wait_and_fetch(self) -> None:
        exchange = Exchange()
        assert exchange.claim("k", "a", 100.0)[0] == "make"
        assert exchange.claim("k", "b", 100.0)[:2] == ("wait", "a")
        assert exchange.claim("k", "a", 100.0)[0] == "make", "two slots of one node share a store and its lock"
        assert exchange.claim("other", "b", 100.0)[0] == "make"
        exchange.keep("k", "a", "courier of a")
        assert exchange.claim("k", "b", 100.0) == ("fetch", "a", "courier of a")
        exchange.keep("k", "b", "courier of b")
        assert {exchange.claim("k", "c", 100.0)[1] for _ in range(4)} == {"a", "b"}, "holders take turns"

    def test_who_cannot_make_it_leaves_it_to_another(self) -> None:
        exchange = Exchange()
        exchange.claim("k", "small", 100.0)
        assert exchange.claim("k", "large", 100.0)[0] == "wait"
        exchange.fail("k", "small")
        assert exchange.claim("k", "small", 100.0)[0] == "wait", "the other is about to ask again"
        assert exchange.claim("k", "large", 100.0)[0] == "make"
        exchange.fail("k", "large")
        assert exchange.claim("k", "small", 100.0)[0] == "make", "both have failed: each may try in another way"

    def test_who_failed_alone_may_try_in_another_way(self) -> None:
        exchange = Exchange()
        exchange.claim("k", "small", 100.0)
        exchange.fail("k", "small")
        assert exchange.claim("k", "small", 100.0)[0] == "make"

    def test_who_is_not_able_takes_what_there_is(self) -> None:
        exchange = Exchange()
        assert exchange.claim("k", "small", 100.0, able=False)[0] == "lack"
        assert exchange.claim("k", "large", 100.0)[0] == "make"
        assert exchange.claim("k", "small", 100.0, able=False)[:2] == ("wait", "large")
        exchange.keep("k", "large", "courier")
        assert exchange.claim("k", "small", 100.0, able=False)[:2] == ("fetch", "large")

    def test_a_holder_that_lost_it_is_not_asked_again(self) -> None:
        exchange = Exchange()
        exchange.keep("k", "a", "courier")
        exchange.drop("k", "a")
        assert exchange.claim("k", "b", 100.0)[0] == "make"
        exchange.drop("never heard of", "a")

    def test_a_lost_runner_holds_and_makes_nothing(self) -> None:
        exchange = Exchange()
        exchange.keep("held", "a", "courier")
        exchange.claim("made", "a", 100.0)
        exchange.claim("elsewhere", "b", 100.0)
        exchange.forget("a")
        assert exchange.claim("held", "c", 100.0)[0] == exchange.claim("made", "c", 100.0)[0] == "make"
        assert exchange.claim("elsewhere", "c", 100.0)[0] == "wait"

    def test_a_promise_to_make_it_ends(self) -> None:
        exchange = Exchange()
        exchange.claim("k", "a", 0.0)
        assert exchange.claim("k", "b", 100.0)[0] == "make"


def test_a_run_may_wait_for_other_nodes(bench: Any) -> None:
    job = bench.job(bench.cell("prefill", "prune", bench.POCKET), timeout_s=100.0, artifact_timeout_s=1000.0)
    assert limit_s(job) == 1100.0
    assert limit_s(job, shared=True) == 2700.0
    judged = dataclasses.replace(job, quality=True)
    assert (limit_s(judged), limit_s(judged, shared=True)) == (1200.0, 3000.0)
    on_a_card = dataclasses.replace(judged, device=bench.device("cuda"))
    assert limit_s(on_a_card) == 1300.0, "its host's CPU may have to make the reference after it"


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
@pytest.mark.timeout(240)
def test_made_on_one_node_and_used_on_both(
    cluster: Any, stores: list[tuple[Any, Path]], command: Any, sweep_file: Any, tmp_path: Path, tools: Any
) -> None:
    judged = (SWEEP % QUICK).replace("quality: false", "quality: {tokens: 1024, choices: 10}")
    process = command("run", sweep_file(judged), "--out", tmp_path / "out", "--address", cluster.address, "--json")
    stdout, stderr = process.communicate(timeout=220)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["outcomes"] == {"ok": 4}
    rows = [record["row"] for record in tools.journal(tmp_path / "out", "row")]
    pruned = [row for row in rows if row["optimization"] == QUICK]
    assert {row["hardware"] for row in pruned} == {"a100", "rtx3090"}
    assert len({row["artifact_key"] for row in pruned}) == 1
    assert sorted(row["artifact_reused"] for row in pruned) == [False, True]
    assert len({row["quality_reference"] for row in rows}) == 1
    for maker in ("prune", "reference"):
        manifests = [list(store.rglob(f"{maker}/*/manifest.json")) for _, store in stores]
        assert [len(found) for found in manifests] == [1, 1]
        assert manifests[0][0].read_bytes() == manifests[1][0].read_bytes(), "one was made, the other is its copy"


@pytest.mark.slow
@pytest.mark.timeout(600)
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
