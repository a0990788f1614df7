"""Do two runs of one sweep agree, and do its figures agree with what can be known otherwise? Plain pandas on Parquet.

    python benchmarks/repeatability.py results/aa-gpu-1 results/aa-gpu-2

Prints, per cell: the variation between rounds of each sweep (of host-bound cells also in units of the host's speed, a
fixed loop on the CPU that fed the device), the ratio of the two sweeps' means with its 95 % interval
(Welch, on logarithms), energy by the counter against integrated power, FLOPs against the closed form (a multiply-add is
two, causal attention full, logits of the last token), and the greatest utilisation. Then, label against label (`again`
changes nothing), the paired ratio over both sweeps.
"""

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

LLAMA_1B = {"hidden": 2048, "keys": 512, "mlp": 3 * 8192, "layers": 16, "vocabulary": 128256}
GPT2 = {"hidden": 768, "keys": 768, "mlp": 2 * 3072, "layers": 12, "vocabulary": 50257}


def rows(folder):
    frame = pd.concat(pd.read_parquet(path) for path in sorted(Path(folder, "rows").glob("*.parquet")))
    return frame.sort_values("started_at").drop_duplicates(["cell_id", "round"], keep="last")


def closed_form(row):
    """FLOPs of one prefill, or of one decoded token at the middle of the request; None for what we do not know."""
    known = {"random:llama-3.2-1b": LLAMA_1B, "random:gpt2": GPT2}.get(row["model"])
    if row["workload"] == "attention":
        return 4.0 * row["batch_size"] * 12 * 64 * row["sequence_length"] ** 2
    if known is None or row["workload"] not in ("prefill", "decode"):
        return None
    hidden, layers = known["hidden"], known["layers"]
    weights = layers * hidden * (2 * hidden + 2 * known["keys"] + known["mlp"])
    head = hidden * known["vocabulary"]
    if row["workload"] == "prefill":
        length = row["sequence_length"]
        return row["batch_size"] * (2.0 * weights * length + 4.0 * layers * hidden * length**2 + 2.0 * head)
    length = row["sequence_length"] + row["new_tokens"] / 2
    return row["batch_size"] * (2.0 * weights + 4.0 * layers * hidden * length + 2.0 * head)


def variation(values):
    return np.std(values, ddof=1) / np.mean(values) if len(values) > 1 else math.nan


def welch(a, b):
    """Ratio of b to a with its 95 % interval."""
    a, b = np.log(a), np.log(b)
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    middle, error = np.mean(b) - np.mean(a), math.sqrt(va + vb)
    if error == 0:
        return math.exp(middle), math.exp(middle), math.exp(middle)
    degrees = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = stats.t.ppf(0.975, degrees) * error
    return tuple(math.exp(value) for value in (middle, middle - half, middle + half))


def short(row):
    size = f"{row['batch_size']}x{row['sequence_length']}"
    return f"{row['model'] or 'none'} {row['workload']} {size} {row['optimization']}"


def main():
    first, second = (rows(folder) for folder in sys.argv[1:3])
    both = pd.concat([first.assign(sweep_number=1), second.assign(sweep_number=2)])
    good = both[both["outcome"].isin(["ok"])].copy()
    print(f"{len(both)} rows, {len(good)} ok")
    good["host_bound"] = good["flags"].map(lambda flags: flags is not None and "launch_bound" in list(flags))
    print(
        "| cell | host-bound | variation 1 | variation 2 | second / first | agrees | counter / power "
        "| FLOPs / closed form | MFU |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    variations = {True: [], False: []}
    in_loops = []
    agreeing, known = 0, 0
    for _, cell in good.groupby("cell_id", sort=False):
        a, b = (cell[cell["sweep_number"] == number]["latency_ms_p50"].to_numpy() for number in (1, 2))
        if len(a) < 2 or len(b) < 2:
            continue
        bound = bool(cell["host_bound"].mean() > 0.5)
        variations[bound] += [variation(a), variation(b)]
        if bound and "host_loop_ms" in cell:
            loops = cell["latency_ms_p50"] / cell["host_loop_ms"]
            in_loops += [variation(values.to_numpy()) for _, values in loops.groupby(cell["sweep_number"])]
        ratio, low, high = welch(a, b)
        known, agreeing = known + 1, agreeing + (low <= 1 <= high)
        energy = (cell["energy_j"] / cell["energy_j_integrated"]).median()
        expected = closed_form(cell.iloc[0])
        flops = f"{cell['flops'].iloc[0] / expected:.4f}" if expected else "-"
        print(
            f"| {short(cell.iloc[0])} | {'yes' if bound else 'no'} | {variation(a):.2%} | {variation(b):.2%} "
            f"| {ratio:.4f} [{low:.4f}, {high:.4f}] | {'yes' if low <= 1 <= high else 'no'} | {energy:.3f} "
            f"| {flops} | {cell['mfu'].max():.1%} |"
        )
    for bound, name, limit in ((False, "device-bound", 0.01), (True, "host-bound", 0.05)):
        values = np.array(variations[bound])
        if len(values):
            print(
                f"\n{name}: {len(values)} values, variation {np.median(values):.2%} in the median, "
                f"{values.max():.2%} at most; {np.mean(values <= limit):.0%} at most {limit:.0%}"
            )
    if in_loops:
        print(
            f"\nhost-bound, in units of host_loop_ms: variation {np.median(in_loops):.2%} in the median, "
            f"{max(in_loops):.2%} at most"
        )
    print(f"\nthe sweeps agree within their 95 % intervals in {agreeing} of {known} cells")
    labels(good)


def labels(good):
    """The paired log-ratio of the two labels of each cell, over blocks."""
    good["plain"] = good["optimization"].str.replace("+again", "", regex=False)
    print("\n| cell | again / plain | 95 % interval |\n|---|---|---|")
    for _, cell in good.groupby(
        ["model", "workload", "batch_size", "sequence_length", "plain"], dropna=False, sort=False
    ):
        again = cell["optimization"] != cell["plain"]
        pairs = cell[~again].merge(cell[again], on=["sweep_number", "block_id", "round"])
        if len(pairs) < 2:
            continue
        ratios = np.log(pairs["latency_ms_p50_y"] / pairs["latency_ms_p50_x"])
        half = stats.t.ppf(0.975, len(ratios) - 1) * ratios.std() / math.sqrt(len(ratios))
        low, high = math.exp(ratios.mean() - half), math.exp(ratios.mean() + half)
        print(f"| {short(cell.iloc[0])} | {math.exp(ratios.mean()):.4f} | [{low:.4f}, {high:.4f}] |")


if __name__ == "__main__":
    main()
