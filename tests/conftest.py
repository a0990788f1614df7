"""Shared by the tests of the measuring core: tiny models, jobs, live sessions in this process, one supervisor."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tasks.cell import NO_MODEL, Cell, ModelSpec, Scalar, Stack, WorkloadPoint
from tasks.device import DeviceInfo
from tasks.job import PROFILES, CellJob
from tasks.metric import Phase
from tasks.probe import installed_packages
from tasks.registry import metric_classes, optimizations, workloads
from tasks.session import Session
from tasks.stacks import parse_stack
from tasks.supervisor import Supervisor

# a loaded machine is slow, and what fails must fail again
settings.register_profile("seeded", deadline=None, derandomize=True)
settings.load_profile("seeded")

TINY_LLAMA = {
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    # far from zero, so that precision and tokens tell stacks apart
    "initializer_range": 0.2,
}
TINY_RESNET = {
    "model_type": "resnet",
    "dtype": "float32",
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_labels": 10,
}
POCKET = ModelSpec(id="pocket", source="pocket", kind="language")
CPUS = tuple(sorted(os.sched_getaffinity(0)))
PACKAGES = installed_packages()
INSTANT = "instant"  # a profile for passes inside the test process


def pytest_configure() -> None:
    """What a shell starts in the background ignores SIGINT, and so would every command that a test interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class AskedFor(Exception):
    """Raised in the place of loading: the device that was asked for."""


class Bench:
    """Makes cells of tiny models, and brings them to life."""

    POCKET = POCKET
    CPUS = CPUS
    INSTANT = INSTANT

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.language = self.random_model("tiny-llama", TINY_LLAMA, "language")
        self.vision = self.random_model("tiny-resnet", TINY_RESNET, "vision")

    def random_model(self, name: str, config: dict[str, Any], kind: Any) -> ModelSpec:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(config))
        return ModelSpec(id=name, source="random", reference=str(path), kind=kind)

    def stored(self, model: ModelSpec) -> ModelSpec:
        """A model with random weights as a checkpoint in a folder."""
        import torch

        from tasks.models.load import load
        from tasks.optimization import LoadOptions

        folder = self.folder / f"{model.id}-stored"
        if not folder.exists():
            load(model, LoadOptions(), torch.device("cpu"), ()).model.save_pretrained(folder)
        return ModelSpec(id=folder.name, source="path", reference=str(folder), kind=model.kind)

    def factory(self, code: str, function: str = "make") -> tuple[ModelSpec, tuple[str, ...]]:
        """A model of a module with this text, and the search path where it lies."""
        number = len(list(self.folder.glob("brought_*.py")))
        (self.folder / f"brought_{number}.py").write_text(code)
        reference = f"brought_{number}:{function}"
        return ModelSpec(id=reference, source="factory", reference=reference, kind="module"), (str(self.folder),)

    def device(self, kind: Any = "cpu", **changes: Any) -> DeviceInfo:
        cpu = {"kind": "cpu", "name": "a CPU", "tag": "cpu", "memory_bytes": 2**34, "packages": dict(PACKAGES)}
        cuda = {
            **cpu, "kind": "cuda", "name": "NVIDIA A100-SXM4-80GB", "tag": "a100-80gb", "memory_bytes": 80 * 2**30,
            "uuid": "GPU-0", "compute_capability": (8, 0), "driver": "580",
        }  # fmt: skip
        return DeviceInfo(**{**(cpu if kind == "cpu" else cuda), **changes})

    def point(self, kind: str, **changes: Scalar) -> WorkloadPoint:
        """A point of the workload with small values of its axes."""
        axes: dict[str, Scalar] = {}
        for name, default in workloads()[kind].axes.items():
            axes[name] = min(default, 32) if type(default) is int else default
            axes[name] = 2 if name == "batch_size" else axes[name]
        return workloads()[kind].point({**axes, **changes})

    def cell(self, kind: str = "prefill", stack: str = "baseline", model: ModelSpec | None = None, **axes: Any) -> Cell:
        workload = workloads()[kind]
        if model is None and workload.needs_model:
            model = self.language if "language" in workload.model_kinds else self.vision
        return Cell(
            model=model or NO_MODEL, workload=self.point(kind, **axes), stack=parse_stack(stack), hardware="cpu"
        )

    def job(self, cell: Cell | None = None, **changes: Any) -> CellJob:
        given: dict[str, Any] = {
            "sweep": "tests", "cell": cell or self.cell("attention"), "hardware_requested": "local",
            "device": self.device(), "profile": "quick", "round": 0, "block_id": "block", "order_in_round": 0,
            "result_key": "key", "run_id": "run", "timeout_s": 240.0, "cpus": CPUS,
            # one thread: with more, tiny kernels wait at barriers for cores that something else is using
            "threads": 1,
            "artifact_dir": str(self.folder / "artifacts"),
        }  # fmt: skip
        return CellJob(**{**given, **changes})

    @contextmanager
    def live(self, job: CellJob, *, applied: str | None = None, calls: int = 2) -> Iterator[Session]:
        """A session as `run_cell` makes it, after `calls` calls of its step, inside its contexts.

        With `applied` another stack is loaded and applied than the cell says: a pretender.
        """
        import torch

        from tasks.row import Row

        forget_compilations()
        torch.set_num_threads(1)  # more would fight over cores with whatever else runs
        torch.manual_seed(job.seed)
        session = Session(job=job, device=torch.device(job.device.kind), row=Row())
        stack: Stack = job.cell.stack if applied is None else parse_stack(applied)
        self.attach(session, stack)
        chosen = [(optimizations()[item.name], item) for item in stack.techniques]
        for technique, item in chosen:
            technique.load(session.load_options, item, session)
        if session.workload.needs_model:
            session.load()
        for technique, item in chosen:
            technique.apply(item, session)
        session.step = session.workload.prepare(session)
        with ExitStack() as contexts:
            if not session.workload.needs_gradients(job.cell.workload):
                contexts.enter_context(torch.inference_mode())
            for technique, item in chosen:
                contexts.enter_context(technique.context(item, session))
            for _ in range(calls):
                session.step.run(0, _ignore)
            yield session
        forget_compilations()

    @staticmethod
    def device_asked_for(patch: pytest.MonkeyPatch, job: CellJob, make: Callable[[Session], Any]) -> str:
        """Where `make` wants the model, in a session on a card, which need not be there."""
        import torch

        from tasks.row import Row

        def load(spec: Any, options: Any, device: torch.device, search_path: Any) -> None:
            raise AskedFor(device.type)

        patch.setattr("tasks.models.load.load", load)
        with pytest.raises(AskedFor) as asked:
            make(Session(job=job, device=torch.device("cuda"), row=Row()))
        return str(asked.value)

    def attach(self, session: Session, stack: Stack) -> None:
        """Give the session the artifacts of `stack`, made in this process where they are not in the store."""
        from tasks import artifacts
        from tasks.row import Row

        job = session.job
        session.job = replace(job, cell=replace(job.cell, stack=stack))
        for item in artifacts.wanted(session.job):
            if artifacts.find(item.spec, Path(job.artifact_dir)) is None:
                maker = Session(job=session.job, device=session.device, row=Row())
                artifacts.make_wanted(maker, item.technique.name)
        artifacts.attach(session)
        session.job = job

    @contextmanager
    def measured(self, job: CellJob) -> Iterator[tuple[Session, dict[str, Any]]]:
        """A live session after all passes of its profile, and its metrics by name, not yet collected."""
        from tasks.timing import Passes

        metrics = {name: cls() for name, cls in metric_classes().items()}
        with self.live(job, calls=0) as session:
            passes = Passes(session)
            whole: dict[Phase, Callable[[], Any]] = {
                Phase.LOAD: lambda: None,
                Phase.FIRST_CALL: passes.first_call,
                Phase.WARMUP: passes.warm_up,
                Phase.LATENCY: passes.latency,
                Phase.THROUGHPUT: passes.throughput,
            }
            for phase, run in whole.items():
                for metric in metrics.values():
                    metric.begin(phase, session)
                run()
                for metric in metrics.values():
                    metric.end(phase, session)
            yield session, metrics


def forget_compilations() -> None:
    """Dynamo counts, and keeps what it compiled, for the whole process; a cell has its own, a test has not."""
    import torch
    from torch._dynamo import utils

    torch._dynamo.reset()
    utils.clear_compilation_metrics()
    utils.counters.clear()


def _ignore(_label: str) -> None:
    return


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    profile = replace(
        PROFILES["quick"], name=INSTANT, warmup_min_s=0.05, warmup_max_s=1.0, latency_s=0.1, latency_max_s=0.4,
        throughput_s=0.15, energy_window_s=0.2,
    )  # fmt: skip
    PROFILES[INSTANT] = profile
    yield Bench(tmp_path_factory.mktemp("bench"))
    del PROFILES[INSTANT]


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """What precision techniques set for the whole process is as before afterwards."""
    import torch

    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.get_num_threads())
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.set_num_threads(before[2])


@pytest.fixture(scope="session", autouse=True)
def _exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """ONNX exports of the same model in this process are copies of the first: tracing it takes half a minute."""
    import tasks.models.onnx_export as export

    real, folder, known = export.export_graph, tmp_path_factory.mktemp("exported"), dict[str, tuple[Path, Any]]()

    def once(model: Any, target: Path, *, vision: bool) -> dict[str, Any]:
        key = f"{model.config.to_json_string()} {model.config.name_or_path} {export.INLINE_BYTES}"
        if key not in known:
            place = folder / str(len(known))
            place.mkdir()
            known[key] = place, real(model, place, vision=vision)
        shutil.copytree(known[key][0], target, dirs_exist_ok=True)
        return dict(known[key][1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_graph", once)
        yield


@pytest.fixture(scope="session")
def supervisor(tmp_path_factory: pytest.TempPathFactory, bench: Bench) -> Iterator[Supervisor]:
    """One CPU bench slot with its fork server for the whole run: the server takes 10 s to start."""
    folder = tmp_path_factory.mktemp("slot")
    slot = Supervisor(bench.device(), cpus=CPUS, log_path=folder / "slot.log", work_dir=folder / "work")
    slot.start()
    yield slot
    slot.close()
