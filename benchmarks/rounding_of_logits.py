"""How far rounding moves the tokens of a captured decode step, and how far a graph that is wrong: what evidence tells.

    python benchmarks/rounding_of_logits.py MODEL STACK [STACK...] [--prompt-tokens 128] [--new-tokens 64]

MODEL is `pocket`, `random:NAME` or `path:FOLDER`; STACK has a static cache. Each line compares a request with the same
one of launched steps, as the evidence of `cuda-graph` does (`DecodeStep.compared`): with attention written out instead
of fused, which only rounds differently; with a graph that once feeds back another token; and with one whose cache
forgets what the first layer knew. No graph is captured, so that this runs on any machine.
"""

import argparse
from contextlib import contextmanager

import torch
from instrumentation import open_session


@contextmanager
def written_out(model):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if before != "eager" else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def fed_wrongly_once(step, calls):
    if calls == 30:
        step.ledger.input.fill_(3)


def forgetful(step, calls):
    step.cache.layers[0].values.zero_()


def wrong(step, fault):
    """In the place of a capture: every replay is a launched step, and the fault after it."""

    def capture(restart, advance, generators):
        calls = 0

        def replay():
            nonlocal calls
            advance()
            calls += 1
            fault(step, calls)

        return replay

    return capture


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("stacks", nargs="+")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    chosen = parser.parse_args()
    axes = {"batch_size": 1, "prompt_tokens": chosen.prompt_tokens, "new_tokens": chosen.new_tokens}
    print("| stack | what differs | same tokens | below the best logit | rounding of logits |\n|---|---|---|---:|---:|")
    for stack in chosen.stacks:
        with torch.inference_mode():
            session = open_session(chosen.model, "decode", stack, axes)
            step = session.step
            cases = [("attention", None, written_out(session.model))]
            cases += [(fault.__name__, fault, step.uncaptured()) for fault in (fed_wrongly_once, forgetful)]
            for name, fault, otherwise in cases:
                session.settings.capture = wrong(step, fault) if fault else None
                step._captured = None
                found = step.compared(otherwise)
                print(f"| {stack} | {name} | {found.same} | {found.distance:.2%} | {found.rounding:.2%} |", flush=True)


if __name__ == "__main__":
    main()
