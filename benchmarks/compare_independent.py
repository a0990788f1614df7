"""Our rows beside the figures of `independent_gpu.py`: median device time and peak memory, and how far they differ.

python benchmarks/compare_independent.py RESULTS... independent.json...

Of several runs of the script the medians are compared, and how far they differ among themselves is shown: steps that
wait for their launches are as fast as the host's clock, which a shared host changes from minute to minute. Then
`in_turn.py` decides.
"""

import json
import sys
from pathlib import Path
from statistics import median

from analysis.load import load


def main() -> None:
    scripts = [json.loads(Path(path).read_text()) for path in sys.argv[1:] if path.endswith(".json")]
    frame = load([Path(folder) for folder in sys.argv[1:] if not folder.endswith(".json")])
    frame = frame[frame["outcome"] == "ok"]
    print("| cell | ours ms | script ms | its runs differ by | differs | ours peak MB | script peak MB | differs |")
    print("|---|---|---|---|---|---|---|---|")
    for (kind, length, stack), rows in frame.groupby(["workload", "sequence_length", "optimization"]):
        others = [script[name] for script in scripts if (name := f"{kind}|{length}|{stack}") in script]
        if not others:
            continue
        column = "latency_ms_p50" if kind == "decode" else "device_ms_p50"
        ours, peak = rows[column].median(), rows["peak_allocated_bytes"].median()
        theirs = [other["ms"] for other in others]
        their_peak = median(other["peak_bytes"] for other in others)
        spread = f"{max(theirs) / min(theirs) - 1:.1%}" if len(theirs) > 1 else ""
        print(
            f"| {kind} {length} {stack} | {ours:.4f} | {median(theirs):.4f} | {spread} "
            f"| {ours / median(theirs) - 1:+.1%} "
            f"| {peak / 1e6:,.1f} | {their_peak / 1e6:,.1f} | {peak / their_peak - 1:+.1%} |"
        )


if __name__ == "__main__":
    main()
