"""What was made before the cell ran: its key, what making it cost, whether it lay ready (see `tasks/artifacts.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.artifacts import makers, run_name
from tasks.metric import Column, Metric, Missing

if TYPE_CHECKING:
    from tasks.session import Session


class ArtifactCost(Metric):
    name = "artifact"
    columns = (
        Column(name="artifact_key", type="string", doc="keys of the stack's artifacts, in its order, joined by +"),
        Column(name="artifact_made_s", type="float", doc="making them, whenever that was; no part of wall_s"),
        Column(
            name="artifact_peak_bytes",
            type="int",
            doc="greatest memory while one was made: reserved on the device, else resident set of its process",
        ),
        Column(name="artifact_bytes", type="int", doc="their files"),
        Column(name="artifact_reused", type="bool", doc="none of them was made for this very run"),
    )

    def collect(self, session: Session) -> dict[str, Any]:
        found = [artifact.manifest for artifact in session.artifacts.values()]
        if not found:
            wanted = makers(session.job.cell.stack)
            reason = "it was not reached" if wanted else "nothing in the stack is made beforehand"
            return {column.name: Missing(reason=reason) for column in self.columns}
        return {
            "artifact_key": "+".join(manifest.key for manifest in found),
            "artifact_made_s": sum(manifest.made_s for manifest in found),
            "artifact_peak_bytes": max(manifest.peak_bytes for manifest in found),
            "artifact_bytes": sum(file["bytes"] for manifest in found for file in manifest.files.values()),
            "artifact_reused": all(manifest.made_for != run_name(session.job) for manifest in found),
        }
