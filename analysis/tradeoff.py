"""The table across hardware: what each optimization saves and costs on each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.compared import POINT, compared, legend_host, notes, present
from analysis.frames import records
from analysis.table import Field, Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

LEGEND_MARKS = (
    "x: throughput relative to the same hardware's own baseline; + faster, - slower, = the same within the margin, "
    "~ indistinguishable, ? no verdict."
)
QUALITY = (("kl_divergence", "KL"), ("perplexity", "ppl"), ("accuracy", "accuracy"), ("top1_agreement", "top-1"))


def tradeoff_table(frame: pd.DataFrame, floor: float | Mapping[str, float] = 0.0) -> Table:
    """Optimizations down, hardware across: memory, throughput over that hardware's own baseline, quality.

    Simulated hardware says so in its heading and has no verdicts.
    """
    import pandas as pd

    table = compared(frame, "throughput_per_s", None, floor)
    lines = ["model", "workload_point", POINT, "optimization"]
    quality = next(((name, header) for name, header in QUALITY if name in table and table[name].notna().any()), None)
    wide = table[lines].drop_duplicates().reset_index(drop=True)
    fields = [Field(header="optimization", form="text", sources=("optimization",))]
    remarks: dict[tuple[Any, ...], list[str]] = {}
    for hardware in table["hardware"].drop_duplicates():
        part = table[table["hardware"] == hardware].drop_duplicates(lines, keep="last")
        for row in records(part):
            found = [f"{hardware}: {note}" for note in notes(row, flags=False)]
            remarks.setdefault(tuple(row[name] for name in lines), []).extend(found)
        names = {
            "memory_bytes": "memory_bytes", "ratio": "ratio", "ratio_lo": "lo", "ratio_hi": "hi", "verdict": "verdict",
            "equivalent": "equivalent", "is_baseline": "is_baseline", "outcome": "outcome", "simulated": "simulated",
        }  # fmt: skip
        if quality:
            names[quality[0]] = quality[0]
        renamed = pd.DataFrame({f"{hardware}.{name}": part[source] for name, source in names.items()})
        wide = wide.merge(pd.concat([part[lines], renamed], axis=1), on=lines, how="left")

        def of(*sources: str, hardware: str = hardware) -> tuple[str, ...]:
            return tuple(f"{hardware}.{source}" for source in sources)

        fields += [
            Field(header="memory", form="bytes", sources=of("memory_bytes"), group=hardware, word=of("outcome")[0]),
            Field(header="speed", form="marked_ratio", sources=of("ratio", "verdict", "equivalent", "is_baseline"),
                  group=hardware),
        ]  # fmt: skip
        if quality:
            fields.append(Field(header=quality[1], form="number", sources=of(quality[0]), group=hardware))
    wide["notes"] = pd.Series([remarks.get(tuple(row), []) for row in wide[lines].to_numpy()], dtype="object")
    return Table(
        title="Trade-off across hardware",
        frame=wide,
        fields=present(wide, fields),
        sections=("model", POINT),
        notes="notes",
        footnotes=(LEGEND_MARKS, *legend_host(remarks.values())),
    )
