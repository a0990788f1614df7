"""Our rows beside the figures of `independent_gpu.py`: median device time and peak memory, and how far they differ.

python benchmarks/compare_independent.py RESULTS... independent.json

Steps that wait for their launches are as fast as the host's clock, which a shared host changes from minute to minute:
for `launch_bound` cells both sides are also compared in units of the loop that each timed beside them.
"""

import json
import sys
from pathlib import Path

from analysis.load import load


def main() -> None:
    *folders, path = sys.argv[1:]
    theirs = json.loads(Path(path).read_text())
    frame = load([Path(folder) for folder in folders])
    frame = frame[frame["outcome"] == "ok"]
    print(
        "| cell | ours ms | independent ms | differs | in host loops | ours peak MB | independent peak MB | differs |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (kind, length, stack), rows in frame.groupby(["workload", "sequence_length", "optimization"]):
        other = theirs.get(f"{kind}|{length}|{stack}")
        if other is None:
            continue
        column = "latency_ms_p50" if kind == "decode" else "device_ms_p50"
        ours, peak = rows[column].median(), rows["peak_allocated_bytes"].median()
        bound = all("launch_bound" in flags for flags in rows["flags"])
        loops = ""
        if bound and "host_loop_ms" in other:
            ratio = (rows[column] / rows["host_loop_ms"]).median() / (other["ms"] / other["host_loop_ms"])
            loops = f"{ratio - 1:+.1%}"
        print(
            f"| {kind} {length} {stack} | {ours:.4f} | {other['ms']:.4f} | {ours / other['ms'] - 1:+.1%} | {loops} "
            f"| {peak / 1e6:,.1f} | {other['peak_bytes'] / 1e6:,.1f} | {peak / other['peak_bytes'] - 1:+.1%} |"
        )


if __name__ == "__main__":
    main()
