"""Our medians against those of plain code, in turn, in one process on one CUDA GPU: whether we measure what is there.

    python benchmarks/in_turn.py [--pairs 12] [CASE ...]

Whole processes of a script (`independent_gpu.py`) differ among themselves by more than one wants to know where steps
wait for the host, whose clock moves. Here both sides take turns every half second on one model, one card and the CPU
that is fast then (chosen by the same rule): our passes as a cell runs them, and a loop of `independent_gpu.py`, which
shares no code with them. Printed is the median of the paired ratios with its interval (order statistics).
"""

import argparse
import json
import time

import torch
from independent_gpu import Decode, median, prefill
from instrumentation import compare, open_session

from tasks.timing import Passes

PROMPT = {"prefill": {"batch_size": 1, "sequence_length": 512},
          "decode": {"batch_size": 1, "prompt_tokens": 512, "new_tokens": 32}}  # fmt: skip
COMPILED = "bf16+static-cache+compile:mode=reduce-overhead"
CASES = {
    f"{kind} {stack}": (kind, stack)
    for kind, stacks in {
        "prefill": ("fp32", "fp16", "bf16"),
        "decode": ("fp32", "fp16", "bf16", "bf16+static-cache", COMPILED),
    }.items()
    for stack in stacks
}
SLICE_S = 0.5


def plain_prefill(call, feeder):
    """Milliseconds of one prompt: the median of events around four."""
    values, began = [], time.perf_counter()
    while time.perf_counter() - began < SLICE_S:
        if feeder.due():
            torch.cuda.synchronize()
            feeder.look()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            call()
        stop.record()
        stop.synchronize()
        values.append(start.elapsed_time(stop) / 4)
    return median(values)


def plain_decode(plain, feeder):
    """Milliseconds of a token that is waited for: the median of some requests."""
    values, began = [], time.perf_counter()
    while time.perf_counter() - began < SLICE_S:
        plain.start()
        for _ in range(PROMPT["decode"]["new_tokens"] - 1):
            values.append(plain.token_ms())
            feeder.look()
    return median(values)


def our_prefill(passes):
    passes.device()
    return median(passes.timings.values("device", passes.step.primary))


def our_decode(passes):
    values, began = [], time.perf_counter()
    while time.perf_counter() - began < SLICE_S:
        values += passes._host_call()[passes.step.primary]
    return median(values)


def measured(model, kind, stack, pairs):
    session = open_session(model, kind, stack, PROMPT[kind])
    with session.contexts():
        passes = Passes(session)
        passes.first_call()
        passes.warm_up()
        with passes.feeding():
            if kind == "prefill":
                passes.latency()  # it finds out whether the device waits for the host
                call = prefill(session.model)
                plain, ours = (lambda: plain_prefill(call, session.feeder)), (lambda: our_prefill(passes))
            else:
                decode = Decode(session.model, static="static-cache" in stack, compiled="compile" in stack)
                plain, ours = (lambda: plain_decode(decode, session.feeder)), (lambda: our_decode(passes))
            for _ in range(2):
                plain()
            return plain(), compare(pairs, plain, ours, session.feeder)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--model", default="random:llama-3.2-1b")
    chosen = parser.parse_args()
    results = {}
    print("| case | plain ms | ours / plain | 95 % interval |\n|---|---|---|---|")
    for case in chosen.cases:
        plain_ms, (middle, low, high) = measured(chosen.model, *CASES[case], chosen.pairs)
        print(f"| {case} | {plain_ms:.3f} | {middle:+.2%} | {low:+.2%} to {high:+.2%} |", flush=True)
        results[case] = {"plain_ms": plain_ms, "ratio": middle, "interval": [low, high]}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
