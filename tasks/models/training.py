"""Training a small language model from nothing on the text in tasks.models.text: its tokenizer, then its weights.

The corpus is about three million tokens, less than one for each parameter of all but the smallest models, so the limit
is overfitting, not time: dropout is strong and the checkpoint with the best held-out perplexity is the one saved.
"""

import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.models.pocket_model import MAX_POSITIONS, SIZES, autocast, build_model, perplexity, train_tokenizer
from tasks.models.text import SEPARATOR, heldout_text, train_text


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run; exactly one of `minutes` (of training time, compilation excluded) and `steps` is set.

    `size` is one of `SIZES`. A step's gradients are added up over `micro_batches`, so that large models fit smaller
    cards. `corpus_chars` shortens the text, for tests.
    """

    size: str = "pocket"
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
    micro_batches: int = 1
    corpus_chars: int | None = None


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


def default_settings(size: str, device: str, minutes: float | None, steps: int | None, seed: int) -> Settings:
    """What `benchmatrix train` uses; larger models learn slower and are fed in parts."""
    large = size == "gpt2"
    on_cuda = device == "cuda"
    return Settings(
        size=size, device=device, minutes=minutes, steps=steps, seed=seed,
        batch_tokens=65_536 if on_cuda else 2048, micro_batches=4 if large and on_cuda else 1,
        sequence=512 if size != "tiny" else 128, learning_rate=1e-3 if large else 2e-3, weight_decay=1.0,
        dropout=0.2 if on_cuda else 0.0, evaluations=20 if on_cuda else 4, compiled=False,
    )  # fmt: skip


def train(settings: Settings, out: Path) -> TrainingRecord:
    """Train tokenizer and model, and save both to `out`, the weights in bfloat16, with training.json beside them."""
    import tokenizers
    import torch
    import transformers
    from torch.nn.functional import cross_entropy

    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(settings.device)
    text = train_text()[: settings.corpus_chars]
    tokenizer = train_tokenizer(text, SIZES[settings.size].vocabulary)
    corpus = encode(tokenizer, text, device)
    heldout = encode(tokenizer, heldout_text()[: settings.corpus_chars], device)
    if device.type == "cpu":
        heldout = heldout[:32_768]
    model = build_model(settings.size).to(device)
    _add_dropout(model, settings.dropout)
    forward = torch.compile(model, dynamic=False) if settings.compiled else model
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    draw = torch.Generator(device).manual_seed(settings.seed)

    def backward(length: int) -> torch.Tensor:
        """Add the gradients of one batch of random slices of `length` tokens; its loss."""
        rows = max(1, settings.batch_tokens // settings.micro_batches // length)
        starts = torch.randint(corpus.numel() - length, (rows, 1), generator=draw, device=device)
        batch = corpus[starts + torch.arange(length + 1, device=device)]
        with autocast(device.type):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss / settings.micro_batches)
        return loss.detach()

    longest = min(MAX_POSITIONS, settings.batch_tokens // settings.micro_batches)
    for length in (settings.sequence, longest):  # compile outside the timed part
        backward(length)
    best, best_step, kept = math.inf, 0, {}
    step, tokens, evaluated = 0, 0, 0
    begin = time.perf_counter()
    done = 0.0
    while done < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(done)
        # One step in four sees whole 2048-token windows, so that every position the model offers is trained.
        length = longest if step % 4 == 3 else settings.sequence
        optimizer.zero_grad(set_to_none=True)
        loss = [backward(length) for _ in range(settings.micro_batches)][-1]
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


def schedule(done: float) -> float:
    """Share of the peak learning rate: linear over the first 3 percent of the run, then a cosine down to zero."""
    return min(1.0, (done + 1e-3) / 0.03) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def encode(tokenizer: Any, text: str, device: Any) -> Any:
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
