"""Where the time of a decoded token goes on the device: its kernels by name, and the gaps between them.

    python benchmarks/profile_decode.py MODEL STACK [--tokens 32] [--prompt-tokens 512] [--batch-size 1]

MODEL is `pocket`, `random:NAME` or `path:FOLDER`; what a stack keeps as an artifact has to be there from a run of it.
The stack is warmed up as a cell's is, then the profiler sees some tokens of one request, its prompt left out. Printed
are, for one token, the time from its first kernel to the next one's, the sum of its kernels, the gaps, and the kernels
with their launches and microseconds, the longest first; the last line is the same as JSON. The profiler costs a few per
cent: `ms_per_token` without it is printed beside.
"""

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from instrumentation import ignore, open_session

from tasks.timing import Passes
from tasks.trace import COPY, KERNEL, events_of

ON_THE_DEVICE = (KERNEL, COPY, "gpu_memset")


def profiled(session, tokens):
    """Kernels and copies of `tokens` tokens after the first one, in the order of their starts."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])

    def mark(label):
        if label == "first_token":
            session.synchronize()
            profiler.start()

    session.step.run_short(mark, tokens)
    session.synchronize()
    profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = events_of(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    return [event for event in events if event.category in ON_THE_DEVICE]


def table(events, tokens):
    """Microseconds of one token: span, kernels, gaps, and each kernel's launches and time."""
    launches, spent = Counter(), defaultdict(float)
    busy_until, busy = events[0].start_us, 0.0
    for event in events:
        launches[event.name] += 1
        spent[event.name] += event.end_us - event.start_us
        busy += max(0.0, event.end_us - max(event.start_us, busy_until))
        busy_until = max(busy_until, event.end_us)
    span = busy_until - events[0].start_us
    kernels = [
        {"kernel": name[:100], "launches": launches[name] / tokens, "us": us / tokens, "us_each": us / launches[name]}
        for name, us in sorted(spent.items(), key=lambda item: -item[1])
    ]
    return {"us_span": span / tokens, "us_busy": busy / tokens, "us_gaps": (span - busy) / tokens, "kernels": kernels}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("stack")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    chosen = parser.parse_args()
    axes = {"batch_size": chosen.batch_size, "prompt_tokens": chosen.prompt_tokens, "new_tokens": 128}
    session = open_session(chosen.model, "decode", chosen.stack, axes)
    with session.contexts():
        passes = Passes(session)
        passes.first_call()
        passes.warm_up()
        with passes.feeding():
            began = time.perf_counter()
            session.step.run(0, ignore)
            session.synchronize()
            whole = time.perf_counter() - began
            began = time.perf_counter()
            session.step.run_short()
            session.synchronize()
            short = time.perf_counter() - began
            found = table(profiled(session, chosen.tokens), chosen.tokens)
    found = {
        "model": chosen.model,
        "stack": chosen.stack,
        "ms_per_token": 1e3 * (whole - short) / 125,
    } | found
    print(
        f"{chosen.stack}: {found['ms_per_token']:.3f} ms a token without the profiler;"
        f" with it {found['us_span']:.0f} us from kernel to kernel, {found['us_busy']:.0f} us in kernels,"
        f" {found['us_gaps']:.0f} us between them"
    )
    print("| kernel | launches a token | us each | us a token |\n|---|---|---|---|")
    for row in found["kernels"][:20]:
        print(f"| {row['kernel']} | {row['launches']:.2f} | {row['us_each']:.2f} | {row['us']:.1f} |")
    print(json.dumps(found | {"kernels": found["kernels"][:20]}))


if __name__ == "__main__":
    main()
