"""What the evidence of a captured decode step can tell: rounding, and graphs that do something else.

    python benchmarks/wrong_graphs.py MODEL STACK [STACK...] [--prompt-tokens 64] [--new-tokens 24]

MODEL is `pocket`, `random:NAME` or `path:FOLDER`; STACK has a static cache. In the place of a graph each replay is a
launched step: with attention by another kernel, which only rounds differently, or with a fault. What is printed is what
`DecodeStep.compared` finds, and what the evidence makes of it: whether launched steps choose the same tokens, how far
below the best one they are if not, how far keys and values are from those of launched steps, and how far rounding alone
takes these. No graph is captured, so that this runs on any machine.
"""

import argparse
from contextlib import contextmanager, nullcontext

from instrumentation import open_session

from tasks.optimizations.cuda_graph import accepted


@contextmanager
def other_attention(model):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if before != "eager" else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def another_token_is_fed_once(step, calls):
    if calls == (step._new - 1) // 2:
        step.ledger.input.fill_(3)


def position_stands_still(step, calls):
    for layer in step.cache.layers:
        layer.cumulative_length.sub_(1)


def new_values_are_a_tenth_too_small(step, calls):
    for layer in step.cache.layers:
        layer.values[:, :, step.prompt_tokens + calls - 1].mul_(0.9)


def half_of_the_prompt_is_lost(step, calls):
    for layer in step.cache.layers:
        layer.values[:, :, : step.prompt_tokens // 2].zero_()


def last_layer_forgets_new_tokens(step, calls):
    step.cache.layers[-1].values[:, :, step.prompt_tokens :].zero_()


FAULTS = (
    another_token_is_fed_once, position_stands_still, new_values_are_a_tenth_too_small, half_of_the_prompt_is_lost,
    last_layer_forgets_new_tokens,
)  # fmt: skip


def replaced(step, inside=nullcontext, fault=lambda step, calls: None):
    """What `Settings.capture` is: a function that gives the replay."""

    def capture(restart, advance, generators):
        calls = 0

        def replay():
            nonlocal calls
            calls = calls % (step._new - 1) + 1  # of the request
            with inside():
                advance()
            fault(step, calls)

        return replay

    return capture


def cases(session):
    step = session.step
    yield "other attention", replaced(step, inside=lambda: other_attention(session.model))
    for fault in FAULTS:
        yield fault.__name__.replace("_", " "), replaced(step, fault=fault)


def show(model, stack, axes):
    session = open_session(model, "decode", stack, axes)
    with session.contexts():
        for name, capture in cases(session):
            session.settings.capture, session.step._captured = capture, None
            found = session.step.compared()
            below = "" if found.same else f"{found.distance:.2%}"
            verdict = "accepted" if accepted(found) else "refused"
            apart = f"{found.cache:.2%} | {'' if found.rounding is None else f'{found.rounding:.2%}'}"
            print(f"| {stack} | {name} | {found.same} | {below} | {apart} | {verdict} |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("stacks", nargs="+")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=24)
    chosen = parser.parse_args()
    axes = {"batch_size": 1, "prompt_tokens": chosen.prompt_tokens, "new_tokens": chosen.new_tokens}
    print("| stack | in the place of a graph | same tokens | below the best | keys and values | by rounding | graph |")
    print("|---|---|---|---:|---:|---:|---|")
    for stack in chosen.stacks:
        show(chosen.model, stack, axes)


if __name__ == "__main__":
    main()
