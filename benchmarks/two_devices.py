"""Do cells spread over the accelerators of one host, each on its own, and do equal devices measure alike?

    python benchmarks/two_devices.py results/two results/0/one results/1/one

The first folder is a run with `--parallel-gpus`, the others are the same sweep on one device each. Prints how many runs
each device of the first had and how many of them overlapped, then each cell on both devices. Exit status 1 if a device
of the first had nothing to do, a run has no device, or a cell differs by more than 2 % beyond its rounds' variation.
Plain pandas on Parquet.
"""

import sys
from pathlib import Path

import pandas as pd

LIMIT = 0.02


def rows(folder):
    frame = pd.concat(pd.read_parquet(path) for path in sorted(Path(folder, "rows").glob("*.parquet")))
    return frame.sort_values("started_at").drop_duplicates(["cell_id", "round"], keep="last")


def overlapping(frame):
    """Runs during which another device was at work."""
    begun = pd.to_datetime(frame["started_at"])
    ended = begun + pd.to_timedelta(frame["wall_s"], unit="s")
    return sum(
        any(
            (device != other) and (a < d) and (c < b)
            for other, c, d in zip(frame["device_uuid"], begun, ended, strict=True)
        )
        for device, a, b in zip(frame["device_uuid"], begun, ended, strict=True)
    )


def main():
    parallel, *single = (rows(folder) for folder in sys.argv[1:4])
    print(f"with --parallel-gpus: {len(parallel)} runs, outcomes {parallel['outcome'].value_counts().to_dict()}")
    spread = parallel["device_uuid"].value_counts()
    print(f"runs per device: {spread.to_dict()}, {overlapping(parallel)} of them beside another")
    devices = [frame["device_uuid"].unique() for frame in single]
    wrong = len(spread) < len(single) or parallel["device_uuid"].isna().any()
    wrong = wrong or any(len(found) != 1 for found in devices) or devices[0][0] == devices[1][0]
    column = "device_ms_p50"
    print("| cell | first ms | second ms | second / first | variation of rounds |")
    print("|---|---|---|---|---|")
    first, second = (frame[frame["outcome"] == "ok"].groupby("cell_id", sort=False) for frame in single)
    for cell_id, here in first:
        if cell_id not in second.groups:
            wrong = True
            continue
        there = second.get_group(cell_id)
        a, b = here[column].median(), there[column].median()
        noise = max(group[column].std() / group[column].mean() for group in (here, there))
        known = here.iloc[0]
        name = f"{known['model']} {known['workload_point']} {known['optimization']}"
        print(f"| {name} | {a:.4f} | {b:.4f} | {b / a - 1:+.2%} | {noise:.2%} |")
        wrong = wrong or abs(b / a - 1) > LIMIT + 2 * noise
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
