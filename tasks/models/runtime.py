"""What workloads, quality and metrics ask of a model in a runtime that is not torch, such as llama.cpp.

It is called as a transformers model is: `model(input_ids=ids, past_key_values=state, use_cache=True,
logits_to_keep=1).logits[:, -1]`; what else they ask of a torch model (parameters, bytes, sizes) it answers for itself.
A technique that brings such a model names its `runtime`, sets `LoadOptions.loader` in `load`, and gets no artifact
loaded by torch: `Optimization.artifact` with `checkpoint=False`. `save_description` puts configuration and tokenizer
beside the runtime's own files, so that the artifact is all that loading needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from tasks.models.load import LoadedModel
    from tasks.session import Session


@dataclass(frozen=True, kw_only=True)
class RuntimeOutput:
    """`logits` (batch, positions, vocabulary), a tensor of its own that later calls leave alone; the state as given."""

    logits: torch.Tensor
    past_key_values: RuntimeState | None = None


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """Weights as the runtime holds them.

    `elements` maps the runtime's name of a storage type to the weights stored so; `parameters` counts tied ones once.
    `embedding_bytes` are those of an input embedding that is not the head's too: a token reads one row of it.
    """

    parameters: int
    bytes: int
    elements: Mapping[str, int]
    embedding_bytes: int = 0


class RuntimeState(ABC):
    """Keys and values of a batch of sequences inside the runtime; calls of the model with it append to them."""

    @abstractmethod
    def get_seq_length(self) -> int:
        """Positions of each sequence so far."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything, keep the memory."""

    @abstractmethod
    def stored_bytes(self) -> dict[str, int]:
        """Device type -> bytes of the keys and values as they are stored now."""


class RuntimeModel(ABC):
    """A loaded model. `config` is the transformers configuration, `device` and `dtype` those of its logits (torch's).

    `runtime` is the name that the technique has, `session.model` is such an object.
    """

    runtime: ClassVar[str]
    config: Any
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: RuntimeState | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> RuntimeOutput:
        """Logits of the last `logits_to_keep` positions, 0 for all, of (batch, length) int64 ids after the state.

        Without a state the sequences stand alone. They are as long as each other and have no mask: who pads, pads on
        the right, where causal attention sees nothing of it.
        """

    def __call__(self, input_ids: torch.Tensor, **keywords: Any) -> RuntimeOutput:
        return self.forward(input_ids, **keywords)

    @abstractmethod
    def new_state(self, batch: int, positions: int) -> RuntimeState:
        """An empty state with room for `positions` of each of `batch` sequences, used for one request after another."""

    @property
    @abstractmethod
    def weights(self) -> StoredWeights:
        """What the runtime holds, counted on what was loaded."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Sizes as read back from what was loaded, under the names that the configuration has for them.

        At least `num_hidden_layers`, `intermediate_size`, `num_attention_heads`, `num_key_value_heads` of Llama types.
        """

    def eval(self) -> RuntimeModel:
        """As torch's modules have it; a runtime only infers."""
        return self


def save_description(loaded: LoadedModel, folder: Path) -> None:
    """Configuration and, where there is one, tokenizer, as transformers writes them."""
    loaded.config.save_pretrained(folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)


def described(model: RuntimeModel, session: Session) -> LoadedModel:
    """`model` as `LoadOptions.loader` returns it: weights from random ones stay random, the tokenizer is the file's."""
    from tasks.models.load import LoadedModel

    return LoadedModel(
        model=model,
        weights="random" if session.job.cell.model.source == "random" else "trained",
        config=model.config,
        tokenizer=read_tokenizer(Path(model.config.name_or_path)),
    )


def read_config(folder: Path) -> Any:
    """What `save_description` wrote; its `name_or_path` is the folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


def read_tokenizer(folder: Path) -> Any | None:
    """The tokenizer in the folder of an artifact, None where it has none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
