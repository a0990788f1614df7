"""llama.cpp as a runtime, through the C functions of its bindings: token ids in, logits out.

Its own loops, samplers and timers are not used: decoding and timing are the workloads' own, as for any other model.
Weights are read into memory, not mapped, so that they count as the process's; the KV cache is allocated for whole
requests, in rows of 256 positions, as llama.cpp does. Calls are handed over in pieces of `BATCH` tokens, which is also
how many it computes at once by default.
"""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.models.gguf_file import ROPE_FACTORS, StoredTensor, read_tensors
from tasks.models.runtime import RuntimeModel, RuntimeOutput, RuntimeState, StoredWeights

if TYPE_CHECKING:
    import torch

BATCH = 512
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_F32 = 0  # ggml_type

_DEBUG = 1  # ggml_log_level

_lines: deque[str] = deque(maxlen=400)  # what the library says, instead of printing it
_backend: list[Any] = []  # the callback must live as long as the library


class LlamaCppError(RuntimeError):
    """llama.cpp refused to do something; the message is its own last words."""


def library() -> Any:
    """The bindings, initialised, with their messages kept in `messages`."""
    import llama_cpp

    if not _backend:

        @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
        def keep(level: int, text: bytes, _data: Any) -> None:
            if level != _DEBUG:
                _lines.append(text.decode(errors="replace").rstrip())

        _backend.append(keep)
        llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
    return llama_cpp


def messages() -> list[str]:
    """The library's last messages."""
    return list(_lines)


def failure(what: str) -> Exception:
    """The error to raise where the library returned nothing, with what it said."""
    said = " ".join(line for line in list(_lines)[-6:] if line)[-300:]
    if "alloc" in said:
        return MemoryError(f"{what}: out of memory: {said}")
    return LlamaCppError(f"{what}: {said}")


def quantize(source: Path, target: Path, code: int, threads: int) -> None:
    """Write `source` again with its matrices in the file type `code` (`llama_ftype`); raises `LlamaCppError`."""
    lib = library()
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = code, threads
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) != 0:
        raise failure(f"quantizing {source.name} to file type {code} failed")


class LlamaCpp(RuntimeModel):
    """A GGUF file in memory, with `threads` for a step.

    Keys and values are F16 and attention is llama.cpp's fused kernel, which rounds to F16 inside, as it chooses by
    default; with `exact` they are F32 and attention is written out.
    """

    runtime = "llama.cpp"

    def __init__(self, file: Path, config: Any, *, threads: int, exact: bool = False) -> None:
        import torch

        lib = self._lib = library()  # kept: nothing can be imported when the process ends
        self.contexts: set[int] = set()  # addresses of those that live
        self.file, self.config, self.threads, self.exact = file, config, threads, exact
        self.device, self.dtype = torch.device("cpu"), torch.float32
        parameters = lib.llama_model_default_params()
        parameters.load_mode, parameters.n_gpu_layers = lib.LLAMA_LOAD_MODE_NONE, 0
        self.handle = lib.llama_model_load_from_file(str(file).encode(), parameters)
        if not self.handle:
            raise failure(f"{file.name} cannot be loaded")
        self.vocabulary = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.handle)))
        self._alone: LlamaCppState | None = None  # for calls without a state

    def __del__(self) -> None:
        """Contexts go first, whatever order the garbage collector takes."""
        while getattr(self, "contexts", None):
            self._lib.llama_free(self.contexts.pop())
        if getattr(self, "handle", None):
            self._lib.llama_model_free(self.handle)
            self.handle = None

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: RuntimeState | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> RuntimeOutput:
        batch, length = input_ids.shape
        state = self._room(batch, length) if past_key_values is None else past_key_values
        assert isinstance(state, LlamaCppState)
        kept = min(logits_to_keep, length) if logits_to_keep else length
        logits = state.append(input_ids, kept).view(batch, kept, self.vocabulary)
        return RuntimeOutput(logits=logits, past_key_values=past_key_values)

    def new_state(self, batch: int, positions: int) -> LlamaCppState:
        return LlamaCppState(self, batch, positions)

    def _room(self, batch: int, length: int) -> LlamaCppState:
        """An empty state for a call that brings none; the last one where it is large enough."""
        if self._alone is None or batch > self._alone.batch or length > self._alone.positions:
            self._alone = None  # its memory first
            self._alone = self.new_state(batch, length)
        self._alone.reset()
        return self._alone

    def states(self) -> Iterator[LlamaCppState]:
        """What calls without a state use, if there was one."""
        if self._alone is not None:
            yield self._alone

    @cached_property
    def tensors(self) -> list[StoredTensor]:
        """What the file stores."""
        return read_tensors(self.file)

    @property
    def weights(self) -> StoredWeights:
        """Totals from the loaded model, types from its file."""
        lib = self._lib
        elements: Counter[str] = Counter()
        for tensor in self.tensors:
            if tensor.name != ROPE_FACTORS:
                elements[_FLOATS.get(tensor.type, tensor.type)] += tensor.elements
        by_name = {tensor.name: tensor for tensor in self.tensors}
        factors = by_name[ROPE_FACTORS].elements if ROPE_FACTORS in by_name else 0
        return StoredWeights(
            parameters=int(lib.llama_model_n_params(self.handle)) - factors,
            bytes=int(lib.llama_model_size(self.handle)),
            elements=dict(elements),
            embedding_bytes=by_name["token_embd.weight"].bytes if "output.weight" in by_name else 0,
        )

    def sizes(self) -> dict[str, int]:
        lib, architecture = self._lib, self.metadata("general.architecture")
        return {
            "num_hidden_layers": int(lib.llama_model_n_layer(self.handle)),
            "hidden_size": int(lib.llama_model_n_embd(self.handle)),
            "intermediate_size": int(self.metadata(f"{architecture}.feed_forward_length") or 0),
            "num_attention_heads": int(lib.llama_model_n_head(self.handle)),
            "num_key_value_heads": int(lib.llama_model_n_head_kv(self.handle)),
        }

    def metadata(self, key: str) -> str | None:
        """A value of the loaded model's metadata as text, None where it has none."""
        value = ctypes.create_string_buffer(512)
        found = self._lib.llama_model_meta_val_str(self.handle, key.encode(), value, len(value))
        return value.value.decode() if found >= 0 else None

    def head_size(self) -> int:
        """Numbers in a key or value of one head."""
        own = self.metadata(f"{self.metadata('general.architecture')}.attention.key_length")
        sizes = self.sizes()
        return int(own) if own else sizes["hidden_size"] // sizes["num_attention_heads"]


class LlamaCppState(RuntimeState):
    """A context of llama.cpp with room for `positions` of each of `batch` sequences."""

    def __init__(self, model: LlamaCpp, batch: int, positions: int) -> None:
        lib = self._lib = library()
        self.model, self.batch, self.positions, self._length = model, batch, positions, 0
        parameters = lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = batch * (-(-positions // 256) * 256), batch
        parameters.n_batch = parameters.n_ubatch = max(BATCH, batch)
        parameters.n_threads = parameters.n_threads_batch = model.threads
        if model.exact:
            parameters.type_k = parameters.type_v = _F32
            parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.kv_unified, parameters.offload_kqv, parameters.no_perf = False, False, True
        self._at_once = int(parameters.n_batch)
        self.handle = lib.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise failure(f"no context for {batch} sequences of {positions} positions")
        self._living = model.contexts
        self._living.add(self.handle)
        self._memory = lib.llama_get_memory(self.handle)

    def __del__(self) -> None:
        if getattr(self, "handle", None) in getattr(self, "_living", ()):
            self._living.discard(self.handle)
            self._lib.llama_free(self.handle)

    def get_seq_length(self) -> int:
        return self._length

    def reset(self) -> None:
        self._lib.llama_memory_clear(self._memory, False)
        self._length = 0

    def stored_bytes(self) -> dict[str, int]:
        """As allocated for all positions; by arithmetic, of sizes read back from the context and the model."""
        lib, sizes = self._lib, self.model.sizes()
        positions = int(lib.llama_n_ctx_seq(self.handle)) * int(lib.llama_n_seq_max(self.handle))
        numbers = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * self.model.head_size()
        return {"cpu": positions * numbers * (4 if self.model.exact else 2)}

    def threads(self) -> tuple[int, int]:
        """Threads of a step of one token and of a prompt, as the context has them."""
        lib = self._lib
        return int(lib.llama_n_threads(self.handle)), int(lib.llama_n_threads_batch(self.handle))

    def append(self, ids: torch.Tensor, kept: int) -> torch.Tensor:
        """Logits of the last `kept` positions of every sequence, (batch * kept, vocabulary), of (batch, length) ids."""
        import numpy
        import torch

        batch, length = ids.shape
        if batch > self.batch or self._length + length > self.positions:
            raise ValueError(
                f"{batch} x {self._length + length} positions do not fit in {self.batch} x {self.positions}"
            )
        tokens = ids.to(torch.int32).reshape(-1).numpy()
        sequences = numpy.repeat(numpy.arange(batch, dtype=numpy.int32), length)
        positions = numpy.tile(numpy.arange(self._length, self._length + length, dtype=numpy.int32), batch)
        wanted = positions >= self._length + length - kept
        found = []
        for begin in range(0, len(tokens), self._at_once):
            part = slice(begin, begin + self._at_once)
            found += self._decode(tokens[part], positions[part], sequences[part], wanted[part])
        self._length += length
        return found[0] if len(found) == 1 else torch.cat(found)

    def _decode(self, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> list[torch.Tensor]:
        import numpy
        import torch

        lib, count = self._lib, len(tokens)
        ones, outputs = numpy.ones(count, dtype=numpy.int32), wanted.astype(numpy.int8)
        # one pointer for each token, to the sequence that it belongs to
        pointers = sequences.ctypes.data + sequences.itemsize * numpy.arange(count, dtype=numpy.uintp)
        names = {"token": tokens, "pos": positions, "n_seq_id": ones, "seq_id": pointers, "logits": outputs}
        types = dict(lib.llama_batch._fields_)
        fields = {name: ctypes.cast(array.ctypes.data, types[name]) for name, array in names.items()}
        code = lib.llama_decode(self.handle, lib.llama_batch(n_tokens=count, embd=None, **fields))
        if code != 0:
            raise failure(f"llama_decode of {count} tokens returned {code}")
        rows = int(wanted.sum())
        if not rows:
            return []
        logits = lib.llama_get_logits(self.handle)  # waits for the computation
        return [torch.from_numpy(numpy.ctypeslib.as_array(logits, (rows, self.model.vocabulary)).copy())]
