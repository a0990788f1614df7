"""A model that ONNX Runtime runs: what the rest of the project sees of it, bound to torch's memory, never copied.

Inputs and outputs are torch tensors whose addresses the session is given, on the CPU as on CUDA. Keys and values lie
in two sets of buffers: the graph reads one and writes the longer ones into the other, so that decoding allocates
nothing. Memory inside the session (its own copies of weights, packed for its kernels) is not torch's: the row has it in
the peaks of the process, on a card in `runtime_bytes`.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.models.onnx_export import cache_names, cache_shape
from tasks.models.onnx_graph import Graph, read_graph
from tasks.models.runtime import RuntimeModel, RuntimeOutput, RuntimeState, StoredWeights

if TYPE_CHECKING:
    import torch

SPINNING = "session.intra_op.allow_spinning"
ASSIGNMENT = "session.record_ep_graph_assignment_info"


class OnnxState(RuntimeState):
    """Keys and values, (batch, heads, length, size) each, as prefixes of flat buffers."""

    def __init__(self, batch: int, positions: int, shape: tuple[int, int, int], device: torch.device) -> None:
        layers, self.heads, self.size = shape
        self.batch, self.length = batch, 0
        self._positions, self._device, self._tensors = positions, device, 2 * layers
        self._front = 0
        self._buffers: list[list[torch.Tensor] | None] = [None, None]  # made when first written
        self._nothing = self._made(1)

    def _made(self, room: int) -> list[torch.Tensor]:
        import torch

        return [torch.empty(room, device=self._device) for _ in range(self._tensors)]

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.length = 0

    def stored_bytes(self) -> dict[str, int]:
        """Of the keys and values themselves; a second set of buffers of the same size lies beside them."""
        element = self._nothing[0].element_size()
        return {self._device.type: self.batch * self.heads * self.length * self.size * element * self._tensors}

    def shape(self, length: int) -> tuple[int, int, int, int]:
        return (self.batch, self.heads, length, self.size)

    def past(self) -> list[torch.Tensor]:
        return (self._buffers[self._front] if self.length else None) or self._nothing

    def present(self, new: int) -> list[torch.Tensor]:
        """Where keys and values of these and `new` more positions go; raises `ValueError` where there is no room."""
        if self.length + new > self._positions:
            raise ValueError(f"a cache for {self._positions} positions was asked to hold {self.length + new}")
        found = self._buffers[1 - self._front]
        if found is None:
            found = self._made(self.batch * self.heads * self._positions * self.size)
            self._buffers[1 - self._front] = found
        return found

    def advance(self, new: int) -> None:
        self.length, self._front = self.length + new, 1 - self._front


class OnnxModel(RuntimeModel):
    """`session` is an `onnxruntime.InferenceSession` of the graph in `path`, exported from so many `parameters`."""

    runtime = "onnxruntime"

    def __init__(self, session: Any, path: Path, config: Any, device: torch.device, parameters: int) -> None:
        import numpy
        import torch

        self.session, self.path, self.config, self.device = session, path, config, device
        self.dtype = torch.float32
        self.parameters_exported = parameters
        self.language = session.get_inputs()[0].name == "input_ids"
        if self.language:
            self._cache = cache_shape(config)
            self._past, self._present = (cache_names(self._cache[0], name) for name in ("past", "present"))
        self._positions: dict[tuple[int, int], torch.Tensor] = {}
        self._types = {torch.int64: numpy.int64, torch.float32: numpy.float32}
        self._binding = session.io_binding()

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: RuntimeState | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> RuntimeOutput:
        import torch

        if not self.language:
            return RuntimeOutput(logits=self._classified(input_ids))
        batch, new = input_ids.shape
        wanted = past_key_values is not None or bool(use_cache)
        state = past_key_values or self.new_state(batch, new if wanted else 0)
        assert isinstance(state, OnnxState)
        kept = self._kept(new, logits_to_keep)
        vocabulary = int(self.config.get_text_config().vocab_size)
        logits = torch.empty(batch, len(kept), vocabulary, device=self.device)
        self._begin()
        self._bind_input("input_ids", input_ids := input_ids.contiguous(), tuple(input_ids.shape))
        self._bind_input("kept", kept, (len(kept),))
        for name, tensor in zip(self._past, state.past(), strict=True):
            self._bind_input(name, tensor, state.shape(state.length))
        self._bind_output("logits", logits, tuple(logits.shape))
        if wanted:
            for name, tensor in zip(self._present, state.present(new), strict=True):
                self._bind_output(name, tensor, state.shape(state.length + new))
        self._run()
        if not wanted:
            return RuntimeOutput(logits=logits)
        state.advance(new)
        return RuntimeOutput(logits=logits, past_key_values=state)

    def _classified(self, images: torch.Tensor) -> torch.Tensor:
        import torch

        logits = torch.empty(len(images), int(self.config.num_labels), device=self.device)
        self._begin()
        self._bind_input("pixel_values", images := images.contiguous(), tuple(images.shape))
        self._bind_output("logits", logits, tuple(logits.shape))
        self._run()
        return logits

    def _kept(self, new: int, logits_to_keep: int) -> torch.Tensor:
        """Positions whose logits are wanted; made once, so that decoding makes none."""
        import torch

        key = (new, min(logits_to_keep or new, new))
        if key not in self._positions:
            self._positions[key] = torch.arange(new - key[1], new, device=self.device)
        return self._positions[key]

    def _begin(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()

    def _bind_input(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        self._binding.bind_input(*self._place(name, tensor, shape))

    def _bind_output(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        self._binding.bind_output(*self._place(name, tensor, shape))

    def _place(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> tuple[Any, ...]:
        return (name, self.device.type, self.device.index or 0, self._types[tensor.dtype], shape, tensor.data_ptr())

    def _run(self) -> None:
        """The session has a stream of its own: torch's work ends before it begins, and it ends before this returns."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.current_stream(self.device).synchronize()
        self.session.run_with_iobinding(self._binding)
        if self.device.type == "cuda":
            self._binding.synchronize_outputs()

    def new_state(self, batch: int, positions: int) -> OnnxState:
        return OnnxState(batch, positions, self._cache, self.device)

    @cached_property
    def graph(self) -> Graph:
        """What is in the session's file."""
        return read_graph(self.path)

    @property
    def weights(self) -> StoredWeights:
        """The initializers of the session's file. Constants that the exporter folded are no parameters of the model."""
        return StoredWeights(
            parameters=self.parameters_exported,
            bytes=round(self.graph.bytes),
            elements=self.graph.elements,
            embedding_bytes=round(self.graph.embedding_bytes),
        )

    def sizes(self) -> dict[str, int]:
        past = {item.name: item.shape for item in self.session.get_inputs() if item.name.startswith("past.")}
        blocks = [linear for linear in self.graph.linears if not linear.head]
        if not past or len(blocks) != 7 * (layers := len(past) // 2):
            return {}  # not of Llama's type
        heads, size = past["past.0.key"][1], past["past.0.key"][3]
        # in the order in which a block computes: queries, keys, values, output, gate, up, down
        output, down = blocks[3], blocks[6]
        return {
            "num_hidden_layers": layers,
            "intermediate_size": down.inputs,
            "num_attention_heads": output.inputs // size,
            "num_key_value_heads": heads,
        }

    def placed(self) -> Counter[tuple[str, str]] | None:
        """(provider, operator) of every node as the live session distributed them, None where it does not say."""
        tell = getattr(self.session, "get_provider_graph_assignment_info", None)
        if tell is None:
            return None
        return Counter((part.ep_name, node.op_type) for part in tell() for node in part.get_nodes())


def open_session(path: Path, device: torch.device, threads: int) -> Any:
    """A session of the graph in `path` with so many threads inside an operator; one operator at a time.

    Its threads spin while they wait, as ONNX Runtime has it by default. Raises `LookupError` where the installed
    ONNX Runtime cannot use the device.
    """
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry(SPINNING, "1")
    options.add_session_config_entry(ASSIGNMENT, "1")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        # its libraries are those that torch brought
        preload = getattr(onnxruntime, "preload_dlls", None)
        if preload is not None:
            preload()
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}))
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise LookupError(f"onnxruntime {onnxruntime.__version__} was built without CUDA")
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    if device.type == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise LookupError(f"onnxruntime {onnxruntime.__version__} cannot start its CUDA provider: see the log")
    return session
