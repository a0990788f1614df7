"""Train pocket, the 4.5-million-parameter Llama that ships with the project, on the text in tasks.models.text.

The corpus is about one token for each parameter, so the limit is overfitting, not time: dropout is strong and the
checkpoint with the best held-out perplexity is the one saved.
"""

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.models.make_pocket_text import SEED, make_choices, make_text
from tasks.models.pocket_model import MAX_POSITIONS, autocast, build_model, perplexity, train_tokenizer
from tasks.models.text import SEPARATOR, heldout_text, train_text


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run; exactly one of `minutes` (of training time, compilation excluded) and `steps` is set."""

    device: str
    minutes: float | None
    steps: int | None
    batch_tokens: int
    sequence: int
    learning_rate: float
    weight_decay: float
    dropout: float
    evaluations: int
    compiled: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What a run did. Perplexities are per token over `heldout_tokens`, in windows of 512 and of 2048 tokens.

    The checkpoint is chosen by `heldout_perplexity`, which is therefore slightly optimistic.
    """

    steps: int
    best_step: int
    tokens: int
    seconds: float
    train_tokens: int
    heldout_tokens: int
    heldout_perplexity: float
    heldout_perplexity_2048: float
    parameters: int
    device: str
    settings: Settings
    versions: dict[str, str]


def train(settings: Settings, out: Path) -> TrainingRecord:
    """Train tokenizer and model, and save both to `out`, the weights in bfloat16, with training.json beside them."""
    import tokenizers
    import torch
    import transformers
    from torch.nn.functional import cross_entropy

    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(settings.device)
    tokenizer = train_tokenizer(train_text())
    corpus = _encode(tokenizer, train_text(), device)
    heldout = _encode(tokenizer, heldout_text(), device)
    if device.type == "cpu":
        heldout = heldout[:32_768]
    model = build_model().to(device)
    _add_dropout(model, settings.dropout)
    forward = torch.compile(model, dynamic=False) if settings.compiled else model
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    draw = torch.Generator(device).manual_seed(settings.seed)

    def backward(length: int) -> torch.Tensor:
        """Add the gradients of one batch of random slices of `length` tokens; its loss."""
        starts = torch.randint(corpus.numel() - length, (settings.batch_tokens // length, 1), generator=draw,
                               device=device)  # fmt: skip
        batch = corpus[starts + torch.arange(length + 1, device=device)]
        with autocast(device.type):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        return loss.detach()

    longest = min(MAX_POSITIONS, settings.batch_tokens)
    for length in (settings.sequence, longest):  # compile outside the timed part
        backward(length)
    best, best_step, kept = math.inf, 0, {}
    step, tokens, evaluated = 0, 0, 0
    begin = time.perf_counter()
    done = 0.0
    while done < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(done)
        # One step in four sees whole 2048-token windows, so that every position the model offers is trained.
        length = longest if step % 4 == 3 else settings.sequence
        optimizer.zero_grad(set_to_none=True)
        loss = backward(length)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        tokens += settings.batch_tokens // length * length
        seconds = time.perf_counter() - begin
        done = step / settings.steps if settings.steps else seconds / (60 * (settings.minutes or 1))
        if int(done * settings.evaluations) > evaluated or done >= 1.0:
            evaluated = int(done * settings.evaluations)
            model.eval()
            found = perplexity(model, heldout, window=512)
            model.train()
            print(f"step {step} epoch {tokens / corpus.numel():.1f} loss {loss.item():.3f} "
                  f"heldout perplexity {found:.3f} {seconds:.0f} s", flush=True)  # fmt: skip
            if found < best:
                best, best_step = found, step
                kept = {name: value.clone() for name, value in model.state_dict().items()}

    seconds = time.perf_counter() - begin
    model.load_state_dict(kept)
    model.eval().to(torch.bfloat16)
    record = TrainingRecord(
        steps=step,
        best_step=best_step,
        tokens=tokens,
        seconds=round(seconds, 1),
        train_tokens=corpus.numel(),
        heldout_tokens=heldout.numel(),
        heldout_perplexity=round(perplexity(model, heldout, window=512), 4),
        heldout_perplexity_2048=round(perplexity(model, heldout, window=MAX_POSITIONS), 4),
        parameters=model.num_parameters(),
        device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        settings=settings,
        versions={m.__name__: str(m.__version__) for m in (torch, transformers, tokenizers)}
        | {"python": platform.python_version()},
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(asdict(record)) + "\n", encoding="ascii")
    return record


def _schedule(done: float) -> float:
    """Share of the peak learning rate: linear over the first 3 percent of the run, then a cosine down to zero."""
    return min(1.0, (done + 1e-3) / 0.03) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _encode(tokenizer: Any, text: str, device: Any) -> Any:
    """[n] token ids; the documents are encoded apart, which the library does in parallel."""
    import torch

    encoded = tokenizer(text.split(SEPARATOR), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, 0)], device=device)


def _add_dropout(model: Any, rate: float) -> None:
    """Dropout on each block's two outputs, by hooks: Llama has it on the attention weights only."""
    from torch.nn.functional import dropout

    def after(module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (dropout(output[0], rate, module.training), *output[1:])
        return dropout(output, rate, module.training)

    for layer in model.model.layers if rate else ():
        layer.self_attn.register_forward_hook(after)
        layer.mlp.register_forward_hook(after)


def main() -> None:
    """Make the text, make the choices or train; the last line that training prints is its record as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tasks.models.train_pocket", description=__doc__)
    parser.add_argument("--make-text", type=Path, metavar="LIB", help="write the texts from CPython's lib/python3.11")
    parser.add_argument("--make-choices", action="store_true", help="write choices.jsonl from the held-out text")
    parser.add_argument("--out", type=Path, help="train, and save the model to this directory")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float)
    length.add_argument("--steps", type=int)
    parser.add_argument("--batch-tokens", type=int, help="tokens a step; default 65536 on cuda, 4096 on cpu")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2, help="for many epochs; use 0 for less than one")
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--compile", action="store_true", dest="compiled")
    parser.add_argument("--seed", type=int, default=SEED)
    values = vars(parser.parse_args())
    library, choices, out = values.pop("make_text"), values.pop("make_choices"), values.pop("out")
    if library:
        make_text(library)
    if choices:
        make_choices()
    if out:
        values["batch_tokens"] = values["batch_tokens"] or (65_536 if values["device"] == "cuda" else 4096)
        if values["minutes"] is None and values["steps"] is None:
            parser.error("--out needs --minutes or --steps")
        print(json.dumps(asdict(train(Settings(**values), out))))
    elif not library and not choices:
        parser.error("nothing to do: give --out, --make-text or --make-choices")


if __name__ == "__main__":
    main()
