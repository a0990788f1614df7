"""Distillation on a teacher of two tiny layers: budget, students, loss, and students that were never taught."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.artifacts import make_wanted, wanted
from tasks.calibration import calibration_windows, text_content, text_file
from tasks.models.identity import ModelError
from tasks.optimizations._pruning import prune, pruned_sizes, sizes_of
from tasks.optimizations.distill import _loss
from tasks.row import Row
from tasks.session import Session

pytestmark = pytest.mark.slow


def distilled(bench: Any, options: str) -> Any:
    import torch

    job = bench.job(bench.cell("prefill", f"distill:{options}"))
    made, _ = make_wanted(Session(job=job, device=torch.device("cpu"), row=Row()), "distill")
    return made


def test_student_learns_what_the_teacher_says(bench: Any) -> None:
    few, more = (distilled(bench, f"steps={steps},alpha=1,learning_rate=0.01").manifest for steps in (10, 100))
    assert few.facts["steps"] == 10
    assert few.facts["tokens"] == 10 * 8 * 256
    assert more.facts["loss_last"] < 0.9 * more.facts["loss_first"]
    assert more.facts["loss_last"] < few.facts["loss_last"]
    assert more.facts["parameters"] < more.facts["parameters_teacher"]
    assert more.facts["changed"] > 0.9


def test_budget_in_seconds(bench: Any) -> None:
    facts = distilled(bench, "seconds=2").manifest.facts
    assert 2 <= facts["seconds"] < 60
    assert facts["steps"] > 0


def test_width_and_layers(bench: Any) -> None:
    from transformers import AutoConfig

    made = distilled(bench, "width=0.5,layers=1,steps=6")
    assert AutoConfig.from_pretrained(made.folder).intermediate_size == 64
    assert made.manifest.facts["layers_kept"] == [0, 1]
    assert made.manifest.facts["mlp"] == 64


def test_student_of_another_architecture(bench: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig

    student = tmp_path / "student.json"
    shape = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 7, "n_positions": 512}
    student.write_text(json.dumps(shape))
    made = distilled(bench, f"student={student},steps=6")
    config = AutoConfig.from_pretrained(made.folder)
    assert (config.model_type, config.vocab_size) == ("gpt2", 256), "of the teacher's vocabulary"
    student.write_text(json.dumps({**shape, "n_embd": 64}))
    job = bench.job(bench.cell("prefill", f"distill:student={student},steps=6"))
    assert wanted(job)[0].spec.key != made.spec.key, "the file counts by its content"


class TestEvidence:
    STACK = "distill:steps=10,learning_rate=0.01"

    @staticmethod
    def proof(session: Session) -> Any:
        ((technique, chosen),) = session.techniques
        return technique.evidence(chosen, session)

    def test_holds_for_the_student(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("prefill", self.STACK))) as session:
            evidence = self.proof(session)
            assert evidence.ok, evidence.facts
            assert evidence.facts["weights_of_the_student"] is True

    def test_not_for_the_teacher_in_its_place(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("prefill", self.STACK))) as session:
            found = session.artifacts
        with bench.live(bench.job(bench.cell("prefill", self.STACK)), applied="baseline") as session:
            session.artifacts = found
            assert not self.proof(session).ok

    def test_not_for_a_student_that_was_not_taught(self, bench: Any) -> None:
        """Layers left out and nothing trained: the teacher's own weights."""
        with bench.live(bench.job(bench.cell("prefill", self.STACK))) as session:
            session.model.model.norm.weight.data.fill_(1.0)  # as random weights begin
            assert not self.proof(session).ok

    def test_not_for_a_loss_that_did_not_fall(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("prefill", self.STACK))) as session:
            session.artifacts["distill"].manifest.facts["loss_last"] = 99.0
            assert not self.proof(session).ok


def test_loss_is_the_formula() -> None:
    import torch

    draw = torch.Generator().manual_seed(0)
    theirs, ours = torch.randn(2, 5, 11, generator=draw), torch.randn(2, 5, 11, generator=draw)
    ids = torch.randint(0, 11, (2, 5), generator=draw)

    def gives(logits: Any) -> Any:
        return lambda **_: SimpleNamespace(logits=logits)

    p, q = (x[:, :-1].double().div(2).softmax(-1) for x in (theirs, ours))
    divergence = (p * (p / q).log()).sum(-1).mean()
    entropy = -ours[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    expected = 0.3 * 4 * divergence + 0.7 * entropy
    assert float(_loss(gives(ours), gives(theirs), ids, 2.0, 0.3)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("what", "ratio"), [("mlp", 0.5), ("heads", 0.5), ("layers", 0.5)])
def test_no_position_sees_what_comes_after_it(bench: Any, what: str, ratio: float) -> None:
    """A pruned model that lost its causal mask would cheat while it recovers, and look very good."""
    import torch

    with bench.live(bench.job(bench.cell("prefill"))) as session:
        model = session.model
    ids = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    prune(model, what, pruned_sizes(sizes_of(model.config), what, ratio), "activation", ids)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % 256
    with torch.no_grad():
        a, b = (model(input_ids=x, use_cache=False).logits[:, :-1] for x in (ids, other))
    assert torch.allclose(a, b, atol=1e-5)


class TestCalibration:
    @pytest.fixture
    def session(self, bench: Any, tmp_path: Path) -> Session:
        import torch

        job = bench.job(bench.cell("prefill", "fp32", bench.POCKET), search_path=(str(tmp_path),))
        session = Session(job=job, device=torch.device("cpu"), row=Row())
        session.load()
        return session

    def test_windows_are_of_the_training_text_and_spread(self, session: Session) -> None:
        from tasks.models.text import heldout_text, train_text

        ids = calibration_windows(session, "", 4, 64)
        assert ids.shape == (4, 64)
        assert session.loaded is not None
        for row in ids.tolist():
            text = session.loaded.tokenizer.decode(row)
            assert text in train_text()
            assert text not in heldout_text()
        assert len({tuple(row) for row in ids.tolist()}) == 4

    def test_the_users_text(self, session: Session, tmp_path: Path, bench: Any) -> None:
        (tmp_path / "mine.txt").write_text("one two three four five six " * 200)
        ids = calibration_windows(session, "mine.txt", 3, 32)
        assert session.loaded is not None
        assert "three" in session.loaded.tokenizer.decode(ids[0].tolist())
        (chosen,) = bench.cell("prefill", "prune:text=mine.txt").stack.techniques
        (shipped,) = bench.cell("prefill", "prune").stack.techniques
        assert text_content(chosen, session.job.search_path) != text_content(shipped, session.job.search_path)

    def test_what_it_refuses(self, session: Session, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"'lost\.txt' is not a file in"):
            text_file("lost.txt", session.job.search_path)
        (tmp_path / "short.txt").write_text("too short")
        with pytest.raises(ModelError, match="9 characters: too few"):
            calibration_windows(session, "short.txt", 2, 64)

    def test_random_weights_have_random_text(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("prefill"))) as session:
            ids = calibration_windows(session, "", 2, 64)
        assert ids.shape == (2, 64)
        assert int(ids.max()) < 256
