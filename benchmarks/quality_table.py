"""What compression costs in quality, one line a stack, the nearest to the reference first: a Markdown table.

    python benchmarks/quality_table.py FOLDER

Read from the first round that judged each cell of a result folder. Bits are those that the evidence counted in the
storage of a compressed weight, and what the format's arithmetic says where it does; perplexity is set against the
reference with the standard error of the paired ratio.
"""

import argparse
import json
import math

from analysis import load

HEADER = (
    "| stack | hardware | model bytes | bits a weight, found = by arithmetic | perplexity | against the reference "
    "| KL divergence | top-1 agreement | kernel | made in s |\n|---|---|---:|---:|---:|---:|---:|---:|---|---:|"
)


def line(row):
    facts = list(json.loads(row["evidence"]).values())
    bits = next((item for item in facts if "bits_per_weight" in item), {})
    found, expected = bits.get("bits_per_weight"), bits.get("bits_per_weight_by_arithmetic")
    ratio = math.exp(row["perplexity_log_ratio"])
    cells = [
        row["optimization"],
        row["hardware"],
        f"{row['model_bytes']:,.0f}",
        ("" if found is None else f"{found:.3f}") + ("" if expected is None else f" = {expected:.3f}"),
        f"{row['perplexity']:.4f}",
        f"{100 * (ratio - 1):+.2f} +- {100 * ratio * row['perplexity_log_ratio_stderr']:.2f} %",
        f"{row['kl_divergence']:.1e}",
        f"{row['top1_agreement']:.4f}",
        next((str(item["kernel"]) for item in facts if item.get("kernel")), ""),
        f"{row['artifact_made_s']:.1f}" if row["artifact_made_s"] >= 0 else "",
    ]
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    frame = load(parser.parse_args().folder)
    judged = frame[(frame["outcome"] == "ok") & frame["kl_divergence"].notna()]
    first = judged.sort_values("round").drop_duplicates("cell_id").sort_values("kl_divergence")
    floor = first["kl_divergence_floor"].max()
    print(HEADER, *(line(row) for row in first.fillna({"artifact_made_s": -1}).to_dict("records")), sep="\n")
    print(f"\n{first['quality_tokens'].iloc[0]:,.0f} tokens; the floor is a KL divergence of {floor:.1g}.")


if __name__ == "__main__":
    main()
