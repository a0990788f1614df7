"""What an optimization technique is: what it needs, how it is applied, and what proves that it took effect."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.cell import Cell, Scalar, Technique
from tasks.device import DeviceInfo, DeviceKind

if TYPE_CHECKING:
    from pathlib import Path

    from tasks.artifacts import ArtifactSpec
    from tasks.job import CellJob
    from tasks.models.load import LoadedModel
    from tasks.session import Session

# Techniques are applied in this order, and a stack is written in it, whatever order the sweep uses. Distillation and
# pruning make another checkpoint, which precision and compression then load; attention and cache change the model;
# checkpointing and offload wrap its modules; compile comes after everything that it should see, and a captured graph
# holds what it made; a decode loop or allocator setting does not touch the model.
FAMILIES: tuple[str, ...] = (
    "precision",
    "distillation",
    "pruning",
    "compression",
    "structure",
    "attention",
    "kv-cache",
    "adapter",
    "optimizer",
    "checkpointing",
    "accumulation",
    "offload",
    "allocator",
    "compile",
    "graphs",
    "decode-loop",
    "control",
)
# What can stand in a stack beside a runtime that is not torch: what makes the checkpoint that the runtime's own file is
# made from, and what does not touch the model.
BESIDE_A_RUNTIME = frozenset({"distillation", "pruning", "decode-loop", "control"})


_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.I
)


def out_of_memory(error: BaseException) -> bool:
    """Whether this says that memory ran out, of a device or of the host."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


class Unsupported(Exception):
    """Raised while loading, applying or proving: this combination cannot work here. The message is the row's reason."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Conditions that can be decided at planning time. Empty tuples mean no restriction.

    `compute_capability` is the least `(major, minor)` on CUDA. `packages` are distribution names; `extra` is the
    project's extra that installs them, with `variables` before the command where it has to be built. Some options need
    `optional_packages`: the technique says which.
    """

    devices: tuple[DeviceKind, ...] = ()
    compute_capability: tuple[int, int] | None = None
    packages: tuple[str, ...] = ()
    optional_packages: tuple[str, ...] = ()
    extra: str | None = None
    variables: str = ""
    workloads: tuple[str, ...] = ()
    model_kinds: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was found on the loaded, applied model: `ok` decides, `facts` says what was seen."""

    ok: bool
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class LoadOptions:
    """How the model is to be loaded; techniques edit it before the load.

    `dtype` is a torch dtype name or None for the published one. `keyword_arguments` go to `from_pretrained`.
    `checkpoint` is the folder of an artifact that is loaded in the place of the model's own weights. `loader` loads the
    model in the place of everything here: for runtimes that are not torch. It is given the session.
    """

    dtype: str | None = None
    attention: str | None = None
    quantization: Any = None
    keyword_arguments: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    loader: Callable[[Session], LoadedModel] | None = None


class Optimization(ABC):
    """One technique. A subclass in `tasks/optimizations/` is discovered; nothing else has to be edited.

    Class attributes: `name` (as in a stack), `family` (one of `FAMILIES`; two of one family exclude each other),
    `summary` (one line for `benchmatrix list`), `needs`, `options` (allowed option names with their defaults; the
    type of the default is the type of the option), `choices` (allowed values of an option), `executed` (the cell
    must run in an executed, not a forked process, since something is read at import), `lossy_cache` (keys and
    values are not kept exactly, so that quality on whole sequences says nothing), `freezes_weights` (training leaves
    the model's own weights as they are, so that they can be held in half precision or compressed), `synchronises`
    (one sentence why the host takes part in every step, so that no CUDA graph can hold one; else empty), `multiplies`
    (what its matrix products multiply where the stack computes in something else, `int8` or `fp8`: their share of a
    ceiling is null where that of such products was not measured), `runtime` (the name of what runs the model in the
    place of torch, through a `tasks.models.runtime.RuntimeModel`; else empty), `runtime_takes` (names of techniques
    that this runtime carries out itself, beside `BESIDE_A_RUNTIME`) and `artifact_version` (raised when the way of
    making the artifact changes: artifacts are made again, and cells that were measured with the old one are too).
    """

    name: ClassVar[str]
    family: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[Needs] = Needs()
    options: ClassVar[dict[str, Scalar]] = {}
    choices: ClassVar[dict[str, tuple[Scalar, ...]]] = {}
    executed: ClassVar[bool] = False
    lossy_cache: ClassVar[bool] = False
    freezes_weights: ClassVar[bool] = False
    synchronises: ClassVar[str] = ""
    multiplies: ClassVar[str] = ""
    runtime: ClassVar[str] = ""
    runtime_takes: ClassVar[tuple[str, ...]] = ()
    artifact_version: ClassVar[int] = 1

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        """One sentence why this cell cannot work on `device`, or None. Overrides call `super()` first."""
        return _unmet(self.name, self.needs, cell, device)

    def environment(self, technique: Technique) -> dict[str, str]:
        """Environment variables that must stand before the process imports anything."""
        return {}

    def content(self, technique: Technique, search_path: tuple[str, ...]) -> dict[str, str]:
        """Hashes of the files that options name: what is measured depends on them, and so do artifacts and row keys."""
        return {}

    def artifact(self, technique: Technique, job: CellJob) -> ArtifactSpec | None:
        """What this technique needs made before its cell runs, or None; needs no torch (`tasks.artifacts`)."""
        return None

    def make_artifact(self, technique: Technique, session: Session, folder: Path) -> dict[str, Any] | None:
        """Make the artifact: write its files into `folder`, return facts for its manifest.

        Runs in a process of its own, with nothing loaded; `session.load()` loads the model that it starts from.
        Raise `Unsupported` where it cannot be made: that becomes the cells' outcome.
        """
        raise NotImplementedError(f"{self.name} makes no artifact")

    def kernels_to_build(self, technique: Technique, job: CellJob) -> str | None:
        """A name for what `build_kernels` may have to compile on this node before the cell, or None; needs no torch."""
        return None

    def build_kernels(self, technique: Technique, session: Session) -> float:
        """Compile it, unless that was done; the seconds that took.

        Runs in a process of its own, where artifacts are at hand, the techniques of the stack have edited
        `session.load_options`, and nothing is loaded. Whatever it raises is left to the cell to find out.
        """
        raise NotImplementedError(f"{self.name} builds nothing")

    def resident(self, technique: Technique) -> float:
        """Share of the blocks' weights that stays on the device, for the predicted footprint."""
        return 1.0

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        """Edit how the model will be loaded."""
        return

    def apply(self, technique: Technique, session: Session) -> None:
        """Change the loaded model or the session (settings, cache kind, step function)."""
        return

    def context(self, technique: Technique, session: Session) -> AbstractContextManager[Any]:
        """Active around every call of the model: first call, warm-up, measuring."""
        return nullcontext()

    @abstractmethod
    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """Proof on the live model, after warm-up, that the technique took effect."""


def _unmet(name: str, needs: Needs, cell: Cell, device: DeviceInfo) -> str | None:
    kind = cell.workload.kind
    if needs.workloads and kind not in needs.workloads:
        return f"{name} applies to {', '.join(needs.workloads)}, not to {kind}"
    if needs.model_kinds and cell.model.kind not in (*needs.model_kinds, "unknown"):
        return f"{name} needs a {' or '.join(needs.model_kinds)} model, {cell.model.id} is {cell.model.kind}"
    if needs.devices and device.kind not in needs.devices:
        return f"{name} needs {' or '.join(needs.devices)}, {device.tag} is {device.kind}"
    least, has = needs.compute_capability, device.compute_capability
    if least is not None and device.kind == "cuda" and has is not None and has < least:
        return f"{name} needs compute capability {least[0]}.{least[1]}, {device.name} has {has[0]}.{has[1]}"
    missing = [package for package in needs.packages if package not in device.packages]
    if missing:
        how = f"pip install '.[{needs.extra}]'" if needs.extra else f"pip install {' '.join(missing)}"
        how = f"{needs.variables} {how}".lstrip()
        return f"{name} needs {', '.join(missing)}, which {device.tag} lacks: {how}"
    return None
