"""Cells whose techniques need something made: through the supervisor, with techniques brought in by an entry point."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import builders, makers, wanted
from tasks.job import CellJob, RunResult
from tasks.manifest import MANIFEST
from tasks.models import identity
from tasks.registry import optimizations
from tasks.supervisor import Supervisor

pytestmark = pytest.mark.slow

# `shrunk` keeps the first layers of the model, and does as its option `end` says. `rounded` starts from what is there.
BROUGHT = """
import os, sys, time
from pathlib import Path
from tasks.artifacts import artifact_spec
from tasks.choices import content_hash
from tasks.optimization import Evidence, Optimization, Unsupported
from tasks.stacks import option


class Shrunk(Optimization):
    name, family, summary = "shrunk", "pruning", "for the test"
    options = {"layers": 1, "end": "well", "text": ""}

    def content(self, technique, search_path):
        return {"text": content_hash(str(option(technique, "text"))) or ""}

    def artifact(self, technique, job):
        return artifact_spec(technique, job, libraries=("torch",))

    def make_artifact(self, technique, session, folder):
        end = option(technique, "end")
        (folder / "begun").touch()
        if end == "unsupported":
            raise Unsupported("this model has no layers to spare")
        if end == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if end == "error":
            raise ValueError("wrong by design")
        if end == "killed":
            os.kill(os.getpid(), 9)
        if end == "slow":
            time.sleep(60)
        (folder / "begun").unlink()
        model = session.load().model
        model.model.layers = model.model.layers[: option(technique, "layers")]
        model.config.num_hidden_layers = len(model.model.layers)
        model.save_pretrained(folder)
        return {"layers": len(model.model.layers)}

    def evidence(self, technique, session):
        layers = len(session.model.model.layers)
        return Evidence(ok=layers == option(technique, "layers"), facts={"layers": layers})


class Rounded(Optimization):
    name, family, summary = "rounded", "compression", "for the test"

    def artifact(self, technique, job):
        return artifact_spec(technique, job)

    def make_artifact(self, technique, session, folder):
        model = session.load().model
        for parameter in model.parameters():
            parameter.data.mul_(64).round_().div_(64)
        model.save_pretrained(folder)
        return {"layers": len(model.model.layers)}

    def evidence(self, technique, session):
        whole = all((p * 64 == (p * 64).round()).all() for p in session.model.parameters())
        return Evidence(ok=bool(whole), facts={"rounded": bool(whole)})


class Compiled(Optimization):
    name, family, summary = "compiled", "control", "for the test"
    options = {"end": "well"}

    def kernels_to_build(self, technique, job):
        return f"kernels {option(technique, 'end')}"

    def build_kernels(self, technique, session):
        if option(technique, "end") == "badly":
            raise RuntimeError("no compiler by design")
        if option(technique, "end") == "never":
            time.sleep(600)
        print("compiled " + str(session.load_options.dtype), file=sys.stderr)
        return 1000.5

    def evidence(self, technique, session):
        return Evidence(ok=True)


class Foreign(Optimization):
    name, family, summary = "foreign", "decode-loop", "for the test"

    def load(self, options, technique, session):
        options.loader = self.bring

    def bring(self, session):
        import dataclasses
        session.load_options.loader = None
        loaded = session.load()
        loaded.model.brought = True
        return loaded

    def evidence(self, technique, session):
        return Evidence(ok=getattr(session.model, "brought", False), facts={"loader": True})
"""


@pytest.fixture(scope="module")
def slot(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    """A bench slot whose processes know the techniques above."""
    folder = tmp_path_factory.mktemp("brought")
    (folder / "brought_techniques.py").write_text(BROUGHT)
    described = folder / "brought_techniques-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: brought_techniques\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(
        "[benchmatrix.optimizations]\n"
        + "".join(
            f"{name.lower()} = brought_techniques:{name}\n" for name in ("Shrunk", "Rounded", "Compiled", "Foreign")
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        search = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(search))
        optimizations.cache_clear()
        supervisor = Supervisor(bench.device(), cpus=bench.CPUS, log_path=folder / "slot.log", work_dir=folder / "work")
        supervisor.start()
        yield supervisor
        supervisor.close()
    sys.modules.pop("brought_techniques", None)
    optimizations.cache_clear()


@pytest.fixture
def job(bench: Any, slot: Supervisor, tmp_path: Path) -> Any:
    def make(stack: str, **changes: Any) -> CellJob:
        cell = bench.cell("prefill", stack, sequence_length=8)
        return bench.job(cell, artifact_dir=str(tmp_path / "store"), **changes)  # type: ignore[no-any-return]

    return make


def ok(result: RunResult) -> dict[str, Any]:
    assert result.row["outcome"] == "ok", result.row.get("reason")
    return result.row


def made(job: CellJob) -> list[Path]:
    return [item.spec.folder(Path(job.artifact_dir)) for item in wanted(job)]


class TestMaking:
    def test_made_once_and_used_by_every_run_that_matches(self, slot: Supervisor, job: Any) -> None:
        first = ok(slot.measure(job("shrunk")))
        plain = ok(slot.measure(job("baseline")))
        assert first["parameters_total"] < plain["parameters_total"]
        assert first["flops"] < plain["flops"], "its arithmetic is counted on the smaller model"
        assert first["weights"] == "random"
        assert (first["artifact_reused"], first["artifact_key"]) == (False, made(job("shrunk"))[0].name)
        assert first["artifact_made_s"] > 0
        assert first["artifact_peak_bytes"] > 2**20
        assert first["artifact_bytes"] > 4 * first["parameters_total"]
        stamp = (made(job("shrunk"))[0] / MANIFEST).stat().st_mtime_ns
        later = ok(slot.measure(job("fp32+shrunk+eager", round=1)))
        assert later["artifact_reused"]
        assert {key: later[key] for key in ("artifact_key", "artifact_made_s")} == {
            key: first[key] for key in ("artifact_key", "artifact_made_s")
        }
        assert (made(job("shrunk"))[0] / MANIFEST).stat().st_mtime_ns == stamp
        reasons = json.loads(plain["null_reasons"])
        assert reasons["artifact_key"] == "nothing in the stack is made beforehand"
        assert "artifact_reused" not in plain

    def test_the_next_starts_from_the_one_before(self, slot: Supervisor, job: Any) -> None:
        row = ok(slot.measure(job("rounded+shrunk")))
        shrunk, rounded = made(job("shrunk+rounded"))
        assert row["artifact_key"] == f"{shrunk.name}+{rounded.name}"
        assert json.loads((rounded / MANIFEST).read_text())["facts"] == {"layers": 1}
        assert made(job("rounded"))[0] != rounded
        assert made(job("shrunk"))[0] == shrunk

    def test_a_loader_in_the_place_of_all(self, slot: Supervisor, job: Any) -> None:
        ok(slot.measure(job("foreign")))

    def test_broken_is_made_again(self, slot: Supervisor, job: Any) -> None:
        ok(slot.measure(job("shrunk")))
        (folder,) = made(job("shrunk"))
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        row = ok(slot.measure(job("shrunk", round=1)))
        assert not row["artifact_reused"]

    def test_content_is_verified_once_by_every_supervisor(self, slot: Supervisor, job: Any) -> None:
        ok(slot.measure(job("shrunk")))
        (folder,) = made(job("shrunk"))
        weights = folder / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-4] + bytes(4))
        assert ok(slot.measure(job("shrunk", round=1)))["artifact_reused"], "the same size: not looked into again"
        slot._verified.clear()
        assert not ok(slot.measure(job("shrunk", round=2)))["artifact_reused"]
        assert weights.read_bytes() == content


class TestBuilding:
    def test_once_and_before_the_cell(self, slot: Supervisor, job: Any) -> None:
        """Its seconds are a column of the run that had it compiled, and part of no other."""
        first, again = ok(slot.measure(job("bf16+compiled"))), ok(slot.measure(job("bf16+compiled", round=1)))
        assert first["kernels_built_s"] == 1000.5
        assert first["load_s"] < 1000 and first["compile_s"] < 1000
        assert "kernels_built_s" not in again
        assert json.loads(again["null_reasons"])["kernels_built_s"] == "nothing was to be compiled before this run"
        assert slot._isolation.log_path.read_text().count("compiled bfloat16") == 1

    @pytest.mark.parametrize(
        ("end", "limit_s", "reason"),
        [("badly", 240.0, "no compiler by design"), ("never", 6.0, "exceeded its limit of 6 s in the phase build")],
    )
    def test_failing_is_left_to_the_cell(
        self, slot: Supervisor, job: Any, end: str, limit_s: float, reason: str
    ) -> None:
        row = ok(slot.measure(job(f"compiled:end={end}", artifact_timeout_s=limit_s)))
        assert reason in json.loads(row["null_reasons"])["kernels_built_s"]

    def test_is_counted_for_time_limits(self, job: Any) -> None:
        assert [builders(job(stack).cell.stack) for stack in ("compiled+shrunk", "shrunk")] == [["compiled"], []]


class TestFailing:
    @pytest.mark.parametrize(
        ("end", "outcome", "reason"),
        [
            ("unsupported", "unsupported", "this model has no layers to spare"),
            ("memory", "oom", "out of memory"),
            ("error", "error", "ValueError: wrong by design"),
            ("killed", "crashed", "killed by SIGKILL in the phase artifact shrunk"),
            ("slow", "timeout", "exceeded its limit of 3 s"),
        ],
    )
    def test_becomes_the_outcome(self, slot: Supervisor, job: Any, end: str, outcome: str, reason: str) -> None:
        limited = {"artifact_timeout_s": 3.0} if end == "slow" else {}
        first = job(f"shrunk:end={end}", **limited)
        assert slot.at_once(first) is None, "nobody has tried it yet"
        rows = [slot.measure(first).row, slot.measure(dataclasses.replace(first, round=1)).row]
        known = slot.at_once(dataclasses.replace(first, round=2))
        assert known is not None and slot.at_once(job("baseline")) is None
        for row in [*rows, known.row]:
            assert row["outcome"] == outcome
            assert row["reason"].startswith(f"the artifact of shrunk:end={end} could not be made: ")
            assert reason in row["reason"]
            assert row["cell_id"] == first.cell.cell_id
        log = slot._isolation.log_path.read_text()
        assert log.count("wrong by design\n") <= 1, "it is not tried again in this sweep"
        store = Path(first.artifact_dir) / "shrunk"
        assert [path.name for path in store.iterdir() if path.suffix != ".lock"] == []

    def test_a_model_that_is_not_there(self, slot: Supervisor, job: Any) -> None:
        lost = job("shrunk")
        model = dataclasses.replace(lost.cell.model, reference="/nowhere/config.json")
        row = slot.measure(dataclasses.replace(lost, cell=dataclasses.replace(lost.cell, model=model))).row
        assert row["outcome"] == "error"
        assert "/nowhere/config.json" in row["reason"]


class TestKey:
    def test_changes_with_each_input(self, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = tmp_path / "text.txt"
        text.write_text("calibration")
        base = job(f"shrunk:text={text}")
        keys = [wanted(base)[0].spec.key]

        def differs(other: CellJob) -> None:
            keys.append(wanted(other)[0].spec.key)
            assert len(set(keys)) == len(keys)

        differs(job(f"shrunk:text={text},layers=2"))
        differs(dataclasses.replace(base, seed=1))
        pocket = dataclasses.replace(base.cell, model=dataclasses.replace(base.cell.model, source="pocket"))
        differs(dataclasses.replace(base, cell=pocket))
        text.write_text("another calibration")
        differs(base)
        text.write_text("calibration")
        path = Path(base.cell.model.reference)
        config = path.read_text()
        path.write_text(config.replace('"intermediate_size": 128', '"intermediate_size": 192'))
        differs(base)
        path.write_text(config)
        monkeypatch.setattr("tasks.artifacts.version", lambda name: "0.0")
        differs(base)
        monkeypatch.undo()
        assert wanted(base)[0].spec.key == keys[0]

    def test_with_the_device_where_it_draws_the_weights(self, job: Any, bench: Any) -> None:
        for model, one in ((bench.POCKET, True), (bench.language, False)):
            base = job("shrunk")
            base = dataclasses.replace(base, cell=dataclasses.replace(base.cell, model=model))
            other = dataclasses.replace(base, device=dataclasses.replace(base.device, name="another"))
            assert (wanted(base)[0].spec.key == wanted(other)[0].spec.key) == one, model.id

    def test_not_with_the_rest(self, job: Any) -> None:
        """One artifact for every workload, attention and round."""
        base = job("shrunk")
        key = wanted(base)[0].spec.key
        for other in (
            job("shrunk+eager"), job("bf16+shrunk"), dataclasses.replace(base, round=3, run_id="later"),
        ):  # fmt: skip
            assert wanted(other)[0].spec.key == key

    def test_makers_are_known_without_the_model(self, job: Any) -> None:
        stacks = [job(stack).cell.stack for stack in ("baseline", "shrunk", "shrunk+rounded", "nf4")]
        assert [makers(stack) for stack in stacks] == [[], ["shrunk"], ["shrunk", "rounded"], []]
        assert identity.checkpoint_hash(job("shrunk").cell.model)
