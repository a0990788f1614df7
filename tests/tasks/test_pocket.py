"""Pocket as committed: its texts, its questions, its tokenizer and its weights."""

import hashlib
import shutil
from pathlib import Path

import pytest

from tasks.models import text
from tasks.models.make_pocket_text import HELDOUT_LARGEST_CHARS, _shingles
from tasks.models.pocket_model import build_model, perplexity, train_tokenizer

POCKET = text.TEXT_DIR.parent
HELDOUT_TOKENS = 4096
# Guessing among the 2048 entries of the vocabulary gives 2048.
HELDOUT_PERPLEXITY_BOUND = 230.0


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(POCKET).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POCKET)


def test_every_data_file_has_its_sum():
    sums = dict(reversed(line.split()) for line in (text.TEXT_DIR / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == {"train.txt.xz", "heldout.txt.xz", "choices.jsonl"}
    for name, digest in sums.items():
        assert hashlib.sha256((text.TEXT_DIR / name).read_bytes()).hexdigest() == digest


def test_altered_text_is_refused_with_the_way_to_restore_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    altered = tmp_path / "text"
    shutil.copytree(text.TEXT_DIR, altered)
    with (altered / "heldout.txt.xz").open("ab") as file:
        file.write(b"\0")
    monkeypatch.setattr(text, "TEXT_DIR", altered)
    with pytest.raises(ValueError, match=r"heldout\.txt\.xz has sha256 .*git checkout"):
        text.heldout_text()


def test_sizes_of_the_texts():
    assert len(text.heldout_text().encode()) >= 300_000
    assert 0.04 <= len(text.heldout_text()) / (len(text.train_text()) + len(text.heldout_text())) <= 0.06
    assert (text.TEXT_DIR / "train.txt.xz").stat().st_size <= 2_500_000
    assert (text.TEXT_DIR / "choices.jsonl").stat().st_size <= 600_000


def test_heldout_documents_are_not_in_the_training_text():
    train = text.train_text()
    known = set().union(*map(_shingles, train.split(text.SEPARATOR)))
    for document in text.heldout_documents():
        assert document.strip()
        assert len(document) <= HELDOUT_LARGEST_CHARS
        assert document not in train
        assert len(_shingles(document) & known) <= 0.1 * len(_shingles(document))


def test_choices_are_four_distinct_endings_of_like_length_and_indent():
    choices = text.multiple_choice()
    assert len(choices) == 1000
    assert len({choice.context for choice in choices}) == len(choices)
    for choice in choices:
        true = choice.endings[choice.label]
        assert len(set(choice.endings)) == 4
        for ending in choice.endings:
            assert ending.startswith("\n") and ending.strip()
            assert abs(len(ending) - len(true)) <= 0.3 * len(true)
            assert len(ending) - len(ending.lstrip()) == len(true) - len(true.lstrip())
    for label in range(4):
        assert 200 <= sum(choice.label == label for choice in choices) <= 300


def test_choices_come_from_the_heldout_text_and_only_the_true_ending_follows():
    heldout, train = text.heldout_text(), text.train_text()
    for choice in text.multiple_choice():
        follows = [choice.context + ending in heldout for ending in choice.endings]
        assert follows == [number == choice.label for number in range(4)]
        assert choice.context not in train


def test_tokenizer_returns_every_heldout_document(tokenizer):
    from transformers import PreTrainedTokenizerFast

    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.eos_token == tokenizer.bos_token == text.SEPARATOR
    assert (len(tokenizer), tokenizer.eos_token_id) == (2048, 0)
    for document in [*text.heldout_documents(), "na\u00efve \u4e2d\u6587\t\r\n"]:
        assert tokenizer.decode(tokenizer(document, verbose=False)["input_ids"]) == document


def test_tokenizer_reads_the_separator_as_one_token(tokenizer):
    assert tokenizer(f"x{text.SEPARATOR}x")["input_ids"].count(0) == 1


def test_no_token_spans_a_context_and_its_ending(tokenizer):
    for choice in text.multiple_choice()[:100]:
        for ending in choice.endings:
            apart = tokenizer(choice.context)["input_ids"] + tokenizer(ending)["input_ids"]
            assert tokenizer(choice.context + ending)["input_ids"] == apart


def test_tokenizer_training_is_deterministic():
    corpus = text.heldout_text()[:200_000]
    first, second = (train_tokenizer(corpus).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_checkpoint_is_small_and_is_what_the_script_builds(model):
    assert 2_000_000 <= model.num_parameters() <= 6_000_000
    assert (POCKET / "model.safetensors").stat().st_size <= 10_000_000
    built = build_model()
    assert model.num_parameters() == built.num_parameters()
    assert model.config.tie_word_embeddings
    assert str(model.dtype) == "torch.bfloat16"


def test_heldout_perplexity(model, tokenizer):
    import torch

    documents = tokenizer(text.heldout_documents(), verbose=False)["input_ids"]
    windows = torch.tensor([token for ids in documents for token in ids]).unfold(0, 512, 512)
    spread = windows[:: len(windows) // 8][:8].flatten()
    assert spread.numel() == HELDOUT_TOKENS
    assert perplexity(model, spread, window=512) < HELDOUT_PERPLEXITY_BOUND
