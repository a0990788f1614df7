"""What our instrumentation costs: the same calls with it and without, in turn, in one process.

    python benchmarks/instrumentation.py [--pairs 20] [CASE ...]

Latency: our pass (clock readings, marks, lists) against a loop that only calls and synchronises at the same places.
Throughput: our pass with the telemetry thread and the energy meter's bookkeeping against a loop that only calls. Each
pair holds some tenths of a second of either, in random order; printed is the median of the paired ratios with its
interval (order statistics).
"""

import argparse
import json
import random
import time

from scipy.stats import binom

from tasks.cell import NO_MODEL, Cell, ModelSpec, WorkloadPoint
from tasks.job import CellJob
from tasks.nvml import open_gpu
from tasks.probe import probe
from tasks.registry import workloads
from tasks.row import Row
from tasks.run_cell import bring_up
from tasks.session import Session
from tasks.stacks import parse_stack
from tasks.telemetry import Telemetry
from tasks.timing import Passes

CASES = {
    "pocket decode": ("pocket", "decode", "fp32", {"batch_size": 1, "prompt_tokens": 64, "new_tokens": 32}),
    "gpt2 decode": ("random:gpt2", "decode", "bf16", {"batch_size": 1, "prompt_tokens": 128, "new_tokens": 32}),
    "gpt2 prefill": ("random:gpt2", "prefill", "bf16", {"batch_size": 8, "sequence_length": 512}),
    "llama-1b prefill": ("random:llama-3.2-1b", "prefill", "bf16", {"batch_size": 8, "sequence_length": 512}),
    "attention 2048": ("none", "attention", "fp16+sdpa-flash", {"sequence_length": 2048}),
}
SLICE_S = 0.3


def open_session(model, kind, stack, axes):
    device = probe().devices[0]
    spec = NO_MODEL if model == "none" else ModelSpec(id=model, source=model.split(":")[0], kind="language",
                                                      reference=model.partition(":")[2] or None)  # fmt: skip
    point = WorkloadPoint(kind=kind, parameters=tuple(sorted({**workloads()[kind].axes, **axes}.items())))
    cell = Cell(model=spec, workload=point, stack=parse_stack(stack), hardware=device.tag)
    job = CellJob(sweep="instrumentation", cell=cell, hardware_requested="local", device=device, profile="quick",
                  round=0, block_id="", order_in_round=0, result_key="", run_id="")  # fmt: skip
    import torch

    session = Session(job=job, device=torch.device(device.kind), row=Row())
    if session.on_cuda:
        session.gpu = open_gpu(device.uuid)
    bring_up(session)
    return session


def ignore(_label):
    return


def bare_latency(session, calls, block=1):
    step, synchronize = session.step, session.synchronize

    def mark(_label):
        synchronize()

    synchronize()
    began = time.perf_counter()
    for number in range(calls // block):
        for _ in range(block - 1):
            step.run(number, ignore)
        step.run(number, mark)
    synchronize()
    return (time.perf_counter() - began) / (calls // block * block)


def our_latency(session, passes, calls):
    blocks = calls // passes.timings.block
    return sum(sum(sum(values) for values in passes._host_call().values()) for _ in range(blocks)) / 1e3 / blocks


def bare_throughput(session, calls):
    session.synchronize()
    began = time.perf_counter()
    for number in range(calls):
        session.step.run(number, ignore)
    session.synchronize()
    return (time.perf_counter() - began) / calls


def our_throughput(session, passes, calls):
    telemetry = Telemetry(session.gpu)
    telemetry.start()
    result = session.timings.throughput
    result.seconds, result.calls, passes._queued = 0.0, 0, None
    began = time.perf_counter()
    while result.calls < calls:
        passes._chunk()
    # of a request the row counts some segments only; what it costs is seen in the whole
    seconds = time.perf_counter() - began if session.step.boundaries else result.seconds
    session.synchronize()
    telemetry.stop()
    return seconds / result.calls


def interval(values):
    """Median with its interval of at least 95 % (from six values on) from order statistics."""
    ordered, n = sorted(values), len(values)
    low = max(int(binom.ppf(0.025, n, 0.5)), 1)  # ranks low and n + 1 - low, counted from one
    return ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2, ordered[low - 1], ordered[n - low]


def compare(pairs, bare, ours, feeder):
    ratios = []
    for _ in range(pairs):
        order = [("bare", bare), ("ours", ours)]
        random.shuffle(order)
        found = {}
        for name, run in order:
            feeder.look()
            found[name] = run()
        ratios.append(found["ours"] / found["bare"] - 1)
    return interval(ratios)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--pairs", type=int, default=20)
    chosen = parser.parse_args()
    results = {}
    print("| case | ms per call | latency pass costs | throughput pass costs |\n|---|---|---|---|")
    for case in chosen.cases:
        session = open_session(*CASES[case])
        with session.contexts():
            passes = Passes(session)
            passes.first_call()
            passes.warm_up()
            per_call = bare_latency(session, 3)
            calls = max(1, round(SLICE_S / per_call))
            passes._chunk_calls = max(1, round(0.025 / per_call))
            with passes.feeding():
                passes.latency()
                latency = compare(chosen.pairs, lambda: bare_latency(session, calls, passes.timings.block),  # noqa: B023
                                  lambda: our_latency(session, passes, calls), session.feeder)  # noqa: B023  # fmt: skip
                throughput = compare(chosen.pairs, lambda: bare_throughput(session, calls),  # noqa: B023
                                     lambda: our_throughput(session, passes, calls), session.feeder)  # noqa: B023  # fmt: skip
        shown = ["{:+.2%} [{:+.2%}, {:+.2%}]".format(*figures) for figures in (latency, throughput)]
        print(f"| {case} | {per_call * 1e3:.3f} | {shown[0]} | {shown[1]} |", flush=True)
        results[case] = {"ms": per_call * 1e3, "latency": latency, "throughput": throughput}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
