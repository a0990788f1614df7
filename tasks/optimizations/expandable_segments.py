"""Segments of the caching allocator that grow in place by mapping pages, instead of new blocks for each larger size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.optimization import Evidence, Needs, Optimization

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.optimization import LoadOptions
    from tasks.session import Session

SETTING = "expandable_segments:True"


class ExpandableSegments(Optimization):
    name = "expandable-segments"
    family = "allocator"
    summary = "allocator segments that grow in place: less fragmentation when sizes keep changing"
    needs = Needs(devices=("cuda",))

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        """Before anything lies on the device: a segment stays of the kind that it was made as."""
        import torch

        change = (
            getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
        )
        change(SETTING)

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """What the allocator says of its segments; those in private pools of CUDA graphs may be of either kind."""
        import torch

        if not session.on_cuda:
            return Evidence(ok=False, facts={"device": session.device.type})
        shared = [s for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", (0, 0))) == (0, 0)]
        growing = [segment for segment in shared if segment.get("is_expandable")]
        facts = {
            "segments": len(shared),
            "expandable": len(growing),
            "expandable_bytes": sum(int(segment["total_size"]) for segment in growing),
        }
        return Evidence(ok=bool(growing) and len(growing) == len(shared), facts=facts)
