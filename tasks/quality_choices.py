"""Multiple choice by log-likelihood: which ending does the model find likeliest after the context?

Every ending is scored alone by the sum of its tokens' log-probabilities, divided by its length in characters: the
convention of lm-evaluation-harness's `acc_norm`, which does not depend on the tokenizer. Divided by the number of
tokens instead it is `accuracy_per_token`, as HellaSwag's authors and most training scripts do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.choices import ChoicesError, read_choices
from tasks.models.text import Choice, multiple_choice

if TYPE_CHECKING:
    import torch

    from tasks.job import CellJob
    from tasks.session import Session

LOGITS = 2**27  # numbers that one batch may produce: 0.5 GiB in fp32, about 1000 positions of the largest vocabularies
ROWS = 32
FLOOR_QUESTIONS, FLOOR_ROWS = 500, 3


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Token ids of a context and one ending, of which the last `ending` are scored."""

    ids: list[int]
    ending: int


def questions(job: CellJob) -> Sequence[Choice]:
    """What is asked: the first `quality_choices` of the user's file, or of those that ship with the project."""
    known = read_choices(job.quality_choices_file) if job.quality_choices_file else multiple_choice()
    return known[: job.quality_choices]


def answer(session: Session, asked: Sequence[Choice], rows: int = ROWS) -> dict[str, torch.Tensor]:
    """The chosen ending of each question, int64 on the host, shape (questions,).

    `answers` by log-likelihood per character, `answers_per_token` per token, and `labels`. At most `rows` sequences
    are run at once: they are padded on the right, which with causal attention nothing that is scored can see, so
    that batches differ from single sequences in the kernels' rounding only. Raises `ChoicesError`.
    """
    import torch

    assert session.loaded is not None
    longest = getattr(session.loaded.config.get_text_config(), "max_position_embeddings", None)
    scored: list[Scored] = []
    for number, choice in enumerate(asked, start=1):
        pairs = [encode(session.loaded.tokenizer, choice.context, ending) for ending in choice.endings]
        if longest is not None and max(pair.ending for pair in pairs) > longest:
            raise ChoicesError(f"question {number}: an ending is longer than the model's {longest} positions")
        # the last token is scored, but never fed: one more than the positions fits
        scored += [
            Scored(ids=pair.ids[-(longest + 1) :] if longest else pair.ids, ending=pair.ending) for pair in pairs
        ]
    sums = _log_likelihoods(session, scored, rows)
    if any(value != value for value in sums):
        raise ChoicesError("the log-likelihood of an ending is not a number: the model's outputs overflow")
    by_character, by_token, at = list[int](), list[int](), 0
    for choice in asked:
        found = slice(at, at := at + len(choice.endings))
        by_character.append(_best(sums[found], map(len, choice.endings)))
        by_token.append(_best(sums[found], (item.ending for item in scored[found])))
    labels = torch.tensor([choice.label for choice in asked])
    return {"answers": torch.tensor(by_character), "answers_per_token": torch.tensor(by_token), "labels": labels}


def answer_floor(session: Session, asked: Sequence[Choice], answers: torch.Tensor) -> dict[str, torch.Tensor]:
    """`floor_accuracy`, shape (1,): share of the first answers that come out otherwise with few rows at once."""
    some = asked[:FLOOR_QUESTIONS]
    again = answer(session, some, FLOOR_ROWS)["answers"]
    return {"floor_accuracy": (again != answers[: len(some)]).double().mean().reshape(1)}


def compare_answers(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Fields of a reading: accuracy with binomial error, and its difference to the reference, paired by question."""
    correct = (ours["answers"] == ours["labels"]).double()
    count, share = len(correct), float(correct.mean())
    fields: dict[str, Any] = {
        "accuracy": share,
        "accuracy_stderr": math.sqrt(share * (1 - share) / count),
        "accuracy_per_token": float((ours["answers_per_token"] == ours["labels"]).double().mean()),
        "choices": count,
    }
    if "answers" in theirs:
        differences = correct - (theirs["answers"] == theirs["labels"]).double()
        fields["accuracy_difference"] = float(differences.mean())
        fields["accuracy_difference_stderr"] = float(differences.std()) / math.sqrt(count) if count > 1 else None
        fields["accuracy_floor"] = float(theirs["floor_accuracy"])
    return fields


def encode(tokenizer: Any, context: str, ending: str) -> Scored:
    """Context and ending as one sequence, divided as lm-evaluation-harness does.

    A single space stands between the two, as in HellaSwag, unless either brings its own whitespace: pocket's endings
    begin with a newline. White space at the end of the context counts as the ending's, for many tokenizers attach it
    to the word that follows. Both are encoded together, with the special tokens that the tokenizer adds by default,
    and what follows the context's own tokens is the ending. Where that fails because a token spans the border, they
    are encoded apart, so that no character is lost or scored twice; there lm-evaluation-harness drops some.
    """
    bare = context.rstrip()
    between = context[len(bare) :] or ("" if ending[:1].isspace() else " ")
    begins = getattr(tokenizer, "bos_token", None)
    special = not (begins and bare.startswith(begins))  # a text that brings its own mark gets no second one
    ids, whole = (
        list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        for text in (bare, bare + between + ending)
    )
    if len(whole) > len(ids) and whole[: len(ids)] == ids:
        return Scored(ids=whole, ending=len(whole) - len(ids))
    tail = list(tokenizer(between + ending, add_special_tokens=False, verbose=False)["input_ids"])
    return Scored(ids=ids + tail, ending=len(tail))


def _best(sums: Sequence[float], lengths: Any) -> int:
    means = [total / length for total, length in zip(sums, lengths, strict=True)]
    return means.index(max(means))


def _log_likelihoods(session: Session, scored: Sequence[Scored], rows: int) -> list[float]:
    """Of each ending after its context: sums over its tokens in nats, log-probabilities in fp32, summed in fp64."""
    import torch

    sums = [0.0] * len(scored)
    assert session.loaded is not None
    vocabulary = int(session.loaded.config.get_text_config().vocab_size)
    for batch in _batches(scored, rows, LOGITS // vocabulary):
        width = max(len(scored[index].ids) for index in batch) - 1
        fed = [scored[index].ids[:-1] for index in batch]
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in fed], device=session.device)
        logits = session.model(input_ids=padded, use_cache=False).logits
        for row, index in enumerate(batch):
            end, count = len(fed[row]), scored[index].ending
            targets = torch.tensor(scored[index].ids[-count:], device=session.device).unsqueeze(-1)
            log_probabilities = torch.log_softmax(logits[row, end - count : end].float(), dim=-1)
            sums[index] = float(log_probabilities.gather(-1, targets).double().sum())
    return sums


def _batches(scored: Sequence[Scored], rows: int, positions: int) -> Iterator[list[int]]:
    """Indices, longest sequences first, so that those of a batch are nearly alike in length."""
    batch: list[int] = []
    for index in sorted(range(len(scored)), key=lambda index: -len(scored[index].ids)):
        if batch and (len(batch) == rows or (len(batch) + 1) * len(scored[batch[0]].ids) > positions):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
