"""`benchmatrix train`: a checkpoint that a sweep can name, with what it reached beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.train_model import train_model
from tasks.cell import ModelSpec
from tasks.models import training
from tasks.models.identity import ModelError, refuse_unsafe
from tasks.models.load import load
from tasks.models.pocket_model import SIZES, build_model
from tasks.optimization import LoadOptions

pytestmark = pytest.mark.slow


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole text takes a minute to read into a tokenizer."""
    whole = training.default_settings

    def short(*arguments: object) -> training.Settings:
        settings = whole(*arguments)  # type: ignore[arg-type]
        return training.Settings(**{**vars(settings), "corpus_chars": 150_000})

    monkeypatch.setattr(training, "default_settings", short)


@pytest.mark.usefixtures("little_text", "torch_settings")
def test_trains_a_checkpoint_of_the_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    folder = tmp_path / "model"
    train_model(folder, size="tiny", minutes=None, steps=30, device="cpu", seed=3)
    *_, hint, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert json.loads((folder / "training.json").read_text()) == record
    assert (record["steps"], record["settings"]["seed"], record["settings"]["size"]) == (30, 3, "tiny")
    assert f"path: {folder}" in hint
    assert record["heldout_perplexity"] < 0.7 * SIZES["tiny"].vocabulary, "guessing gives the vocabulary"
    refuse_unsafe(folder, trust_remote_code=False)
    spec = ModelSpec(id="mine", source="path", reference=str(folder), kind="language")
    loaded = load(spec, LoadOptions(), torch.device("cpu"), ())
    assert loaded.weights == "trained"
    assert len(loaded.tokenizer) == SIZES["tiny"].vocabulary
    assert loaded.model.num_parameters() == build_model("tiny").num_parameters() == record["parameters"]
    with pytest.raises(ModelError, match="not empty"):
        train_model(folder, size="tiny", minutes=None, steps=1, device="cpu", seed=0)


@pytest.mark.usefixtures("little_text", "torch_settings")
def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_model(tmp_path / name, size="tiny", minutes=None, steps=2, device="cpu", seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_parts_hold_whole_windows() -> None:
    settings = training.default_settings("gpt2", "cuda", 3.0, None, 0)
    assert settings.batch_tokens % (settings.micro_batches * 2048) == 0, "whole windows in every part"


def test_sizes_are_what_they_are_called() -> None:
    import torch

    with torch.device("meta"):
        counts = {size: build_model(size).num_parameters() for size in SIZES}
    assert 4e6 < counts["pocket"] < 5e6
    assert 0.95e8 < counts["gpt2"] < 1.25e8
    for name in ("pocket", "gpt2"):
        shape = SIZES[name]
        assert shape.hidden % 256 == shape.intermediate % 256 == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": "gpt3"}, "did you mean 'gpt2'"),
        ({"minutes": 1.0, "steps": 1}, "not both"),
        ({"device": "tpu"}, "neither cpu nor cuda"),
    ],
)
def test_bad_input(tmp_path: Path, given: dict[str, object], message: str) -> None:
    usual = {"size": "tiny", "minutes": None, "steps": 1, "device": "cpu", "seed": 0}
    with pytest.raises(ModelError, match=message):
        train_model(tmp_path / "new", **{**usual, **given})  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
