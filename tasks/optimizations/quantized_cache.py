"""Keys and values in 2, 4 or 8 bits with scales per group, after KIVI; the latest tokens stay in full precision."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tasks.optimization import Needs
from tasks.optimizations._cache import CacheKind
from tasks.optimizations._quanto import settle_unpacking
from tasks.stacks import option
from tasks.workloads._decode_cache import bytes_of

if TYPE_CHECKING:
    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.job import CellJob
    from tasks.session import Session

PACKAGE = {"quanto": "optimum-quanto", "hqq": "hqq"}
BITS = {"quanto": (2, 4), "hqq": (2, 4, 8)}
SCALE_BITS = 1.25  # per element: scale and zero point of up to 32 bits each for a group of 64, and some padding


class QuantizedCacheKind(CacheKind):
    name = "quantized-cache"
    summary = "KV cache in 2, 4 or 8 bits, the latest tokens in full precision"
    needs = Needs(
        workloads=("decode",), model_kinds=("language",), optional_packages=tuple(PACKAGE.values()), extra="kvquant"
    )
    options = {"bits": 4, "backend": "quanto", "residual": 128}
    choices = {"bits": (2, 4, 8), "backend": ("quanto", "hqq")}
    class_name = "QuantizedCache"
    lossy_cache = True

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        refusal = super().unsupported(cell, device)
        if refusal is not None:
            return refusal
        technique = next(item for item in cell.stack.techniques if item.name == self.name)
        backend, bits = str(option(technique, "backend")), option(technique, "bits")
        if bits not in BITS[backend]:
            return f"{self.name} with {backend} stores {' or '.join(map(str, BITS[backend]))} bits, not {bits}"
        if int(option(technique, "residual")) < 1:
            return f"{self.name} needs residual, the latest tokens in full precision, to be at least 1"
        if PACKAGE[backend] not in device.packages:
            how = "pip install '.[kvquant]'" if backend == "quanto" else f"pip install {PACKAGE[backend]}"
            return f"{self.name} needs {PACKAGE[backend]}, which {device.tag} lacks: {how}"
        return None

    def apply(self, technique: Technique, session: Session) -> None:
        super().apply(technique, session)
        if option(technique, "backend") == "quanto":
            settle_unpacking(session.device)

    def kernels_to_build(self, technique: Technique, job: CellJob) -> str | None:
        return f"quanto {job.device.kind}" if option(technique, "backend") == "quanto" else None

    def build_kernels(self, technique: Technique, session: Session) -> float:
        began = time.perf_counter()
        settle_unpacking(session.device)
        return time.perf_counter() - began

    def make_cache(self, technique: Technique, session: Session, positions: int) -> Any:
        from transformers import QuantizedCache

        return QuantizedCache(
            backend=str(option(technique, "backend")),
            config=session.model.config,
            nbits=int(option(technique, "bits")),
            residual_length=int(option(technique, "residual")),
        )

    def held_share(self, technique: Technique, bytes_per_element: float) -> float:
        return int(option(technique, "bits")) / (8 * bytes_per_element)

    def recognizes(self, technique: Technique, cache: Any, facts: dict[str, Any]) -> bool:
        """Stored bits of the quantized part, and how many tokens are in it."""
        layer = cache.layers[0]
        residual = layer.keys.shape[-2] if layer.keys.dim() == 4 else 0
        elements = 2 * _elements_per_token(layer) * (facts["cached_tokens"] - residual)
        stored = sum(bytes_of([layer._quantized_keys, layer._quantized_values]).values())
        facts["tokens_in_full_precision"] = residual
        facts["bits_per_element"] = bits = 8 * stored / elements if elements else None
        wanted = int(option(technique, "bits"))
        facts["layer_class"] = type(layer).__name__
        if option(technique, "backend") == "quanto":
            facts["unpacking"] = settle_unpacking(layer.keys.device)
        right = str(option(technique, "backend")).lower() in type(layer).__name__.lower()
        return right and bits is not None and wanted <= bits <= wanted + SCALE_BITS


def _elements_per_token(layer: Any) -> int:
    """Batch times heads times head size, from whatever the layer holds of its keys."""
    whole = layer._dequantize(layer._quantized_keys)
    return int(whole.numel() // whole.shape[-2])
