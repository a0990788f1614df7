"""The state of one measuring process: what was loaded, how it was changed, and what was observed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tasks.cores import Feeder
from tasks.gpu import Gpu, NoGpu
from tasks.job import PROFILES, CellJob, Profile
from tasks.optimization import LoadOptions, Optimization
from tasks.registry import optimizations, workloads
from tasks.row import Row

if TYPE_CHECKING:
    import torch

    from tasks.artifacts import Artifact
    from tasks.cell import Technique
    from tasks.energy import EnergyReading
    from tasks.metric import Missing
    from tasks.models.load import LoadedModel
    from tasks.quality import QualityReading
    from tasks.timing import Timings
    from tasks.transfers import Transfers
    from tasks.workload import Step, Workload
    from tasks.workloads._decode_checks import StopCheck
    from tasks.workloads._decode_steps import StepFactory
    from tasks.workloads.attention import AttentionShape, Kernel


@dataclass(kw_only=True)
class Settings:
    """What techniques may set, and workloads read. `compile` holds keyword arguments of `torch.compile`."""

    compile: dict[str, Any] | None = None
    token_step: StepFactory | None = None  # how a decode loop gets its next token; None: a cache that grows
    stop_check: Callable[[], StopCheck] | None = None  # how a decode loop learns of the end; None: it never asks
    # (restart, advance, generators) -> a replay of `advance`, which reads and writes fixed addresses of the device only
    capture: Callable[[Callable[[], None], Callable[[], None], list[Any]], Callable[[], None]] | None = None
    autocast: str | None = None  # torch dtype name: training runs under autocast in it
    loss_scaling: bool = False
    attention: Callable[[AttentionShape], Kernel] | None = None  # for the attention workload: makes its kernel
    transfers: Transfers | None = None  # of weights that live elsewhere and are fetched for every use
    offload: Any = None  # where such weights are, for the technique that put them there
    optimizer: Callable[[list[Any], float], Any] | None = None  # (parameters, learning rate) -> optimizer, else AdamW
    micro_batches: int = 1  # training: forward and backward passes per optimizer step
    replays: bool = False  # compiled code runs as CUDA graphs, whose outputs the next replay overwrites


@dataclass(kw_only=True)
class Session:
    """Everything that techniques, workloads and metrics share while a cell is measured."""

    job: CellJob
    device: torch.device
    row: Row
    gpu: Gpu = field(default_factory=NoGpu)
    settings: Settings = field(default_factory=Settings)
    load_options: LoadOptions = field(default_factory=LoadOptions)
    loaded: LoadedModel | None = None
    artifacts: dict[str, Artifact] = field(default_factory=dict)  # by the name of the technique that they belong to
    step: Step | None = None
    timings: Timings | None = None
    quality: QualityReading | Missing | None = None
    feeder: Feeder = field(default_factory=Feeder)  # chooses the CPU from which a GPU is fed
    # drives the throughput pass: given a chunk of work that returns its units, runs it over an energy window
    meter: Callable[[Callable[[], float]], EnergyReading | Missing] | None = None

    @property
    def model(self) -> Any:
        """The live model; None for kernels."""
        return self.loaded.model if self.loaded else None

    @property
    def profile(self) -> Profile:
        return PROFILES[self.job.profile]

    @property
    def workload(self) -> Workload:
        return workloads()[self.job.cell.workload.kind]

    @property
    def techniques(self) -> list[tuple[Optimization, Technique]]:
        """The stack, in the order in which it is applied."""
        known = optimizations()
        return [(known[technique.name], technique) for technique in self.job.cell.stack.techniques]

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def load(self, options: LoadOptions | None = None, device: torch.device | None = None) -> LoadedModel:
        """The cell's model as `options` say, by default as the stack does; it is kept as `loaded`.

        It lies on `device`, by default the session's; a `loader` of the options has its own mind.
        """
        from tasks.models.load import load

        options = options or self.load_options
        if options.loader is not None:
            self.loaded = options.loader(self)
        else:
            self.loaded = load(self.job.cell.model, options, device or self.device, self.job.search_path)
        return self.loaded

    def kept_on(self, options: LoadOptions) -> torch.device:
        """Where a model that is only read and saved is loaded: on the host, so that it need not fit on the device.

        Random weights are those that the device's own generator draws.
        """
        import torch

        drawn = options.checkpoint is None and self.job.cell.model.source == "random"
        return self.device if drawn else torch.device("cpu")

    def synchronize(self) -> None:
        if self.on_cuda:
            import torch

            torch.cuda.synchronize(self.device)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as the stack wants it: compiled if a technique asked for that, else as it is."""
        if self.settings.compile is None:
            return function
        import torch

        from tasks.compilation import keep_all_records

        keep_all_records()
        return torch.compile(function, **self.settings.compile)

    def contexts(self) -> ExitStack:
        """All techniques' contexts, entered; inference mode too unless the workload has a backward pass."""
        stack = ExitStack()
        if not self.workload.needs_gradients(self.job.cell.workload):
            import torch

            stack.enter_context(torch.inference_mode())
        for technique, chosen in self.techniques:
            stack.enter_context(technique.context(chosen, self))
        return stack
