"""Questions of a user's file: what is refused, where context and ending are divided, how they are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.choices import ChoicesError, content_hash, read_choices
from tasks.models.text import Choice
from tasks.quality_choices import answer, compare_answers, encode

GOOD = {"ctx": "def f(x):", "endings": ["return x", "import y", "class Z"], "label": 0}


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


class TestReading:
    def test_published_format(self, tmp_path: Path) -> None:
        """HellaSwag's own keys, the label as a number or as digits, more keys than are needed, blank lines."""
        row = {
            "ind": 24, "activity_label": "Roof", "ctx_a": "A man is on a roof.", "ctx_b": "he",
            "ctx": "A man is on a roof. he", "split": "val", "endings": ["is wrapping.", "is ripping."], "label": 1,
        }  # fmt: skip
        apart = {key: value for key, value in row.items() if key != "ctx"}
        alone = {**apart, "ctx_b": "", "label": "0"}
        path = written(tmp_path, row, "", {**row, "label": "1"}, apart, alone)
        endings = ("is wrapping.", "is ripping.")
        found = read_choices(path)
        assert found[0] == Choice(context="A man is on a roof. he", endings=endings, label=1)
        assert found[1] == found[2] == found[0]
        assert found[3] == Choice(context="A man is on a roof.", endings=endings, label=0)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("{", "not JSON"),
            ("[" * 100_000, "not JSON"),
            ("[1]", "a list, not an object"),
            ({**GOOD, "ctx": None}, "ctx is a NoneType"),
            ({**GOOD, "ctx": " \n"}, "ctx is empty"),
            ({**GOOD, "ctx": "\ud800"}, "surrogate"),
            ({"endings": ["a", "b"], "label": 0}, "the key ctx is missing"),
            ({"ctx": "a", "label": 0}, "the key endings is missing"),
            ({"ctx": "a", "endings": ["a", "b"]}, "the key label is missing"),
            ({**GOOD, "endings": "abc"}, "a list of two or more"),
            ({**GOOD, "endings": ["a"]}, "a list of two or more"),
            ({**GOOD, "endings": ["a", ""]}, "endings[1] is empty"),
            ({**GOOD, "endings": ["a", 3]}, "endings[1] is a int"),
            ({**GOOD, "label": 3}, "label 3 is out of range: the 3 endings are numbered 0 to 2"),
            ({**GOOD, "label": -1}, "label -1 is out of range"),
            ({**GOOD, "label": "7"}, "label 7 is out of range"),
            ({**GOOD, "label": "a"}, "label 'a' is not a whole number"),
            ({**GOOD, "label": 0.0}, "label 0.0 is not a whole number"),
            ({**GOOD, "label": True}, "label True is not a whole number"),
            ({**GOOD, "label": ""}, "test set is published without"),
        ],
    )
    def test_mistakes_name_file_and_line(self, tmp_path: Path, row: Any, message: str) -> None:
        path = written(tmp_path, GOOD, row, GOOD)
        with pytest.raises(ChoicesError) as caught:
            read_choices(path)
        assert str(caught.value).startswith(f"{path}:2: ")
        assert message in str(caught.value)

    def test_files_that_cannot_be(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.jsonl", tmp_path):
            with pytest.raises(ChoicesError, match="cannot be read"):
                read_choices(path)
        with pytest.raises(ChoicesError, match=":1: no question"):
            read_choices(written(tmp_path, ""))
        (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"ctx": "\xe9"}\n')
        with pytest.raises(ChoicesError, match=r"latin\.jsonl:2: not UTF-8"):
            read_choices(tmp_path / "latin.jsonl")

    def test_an_edited_file_is_read_again(self, tmp_path: Path) -> None:
        path = written(tmp_path, GOOD)
        before = content_hash(str(path))
        assert read_choices(path)[0].label == 0
        written(tmp_path, {**GOOD, "label": 2})
        assert read_choices(path)[0].label == 2
        assert content_hash(str(path)) != before

    def test_hash_of_nothing(self, tmp_path: Path) -> None:
        assert content_hash("") is None
        assert content_hash(str(tmp_path / "none")) is None


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from tasks.models.identity import POCKET

    return AutoTokenizer.from_pretrained(POCKET)


class Marking:
    """One token per character, after a first token that marks the beginning of a text."""

    bos_token = "<s>"

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}


class Merging:
    """One token per character, but `= y` is one."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text.replace("= y", "\u2261")]}


class TestBorder:
    def test_a_single_space(self, tokenizer: Any) -> None:
        pair = encode(tokenizer, "def f(x):", "return x")
        assert pair.ids == tokenizer("def f(x): return x")["input_ids"]
        assert tokenizer.decode(pair.ids[-pair.ending :]) == " return x"

    @pytest.mark.parametrize(("context", "ending"), [("a =\n", "b"), ("a =", "\n    b"), ("a = ", "b")])
    def test_none_where_there_is_white_space(self, tokenizer: Any, context: str, ending: str) -> None:
        pair = encode(tokenizer, context, ending)
        assert tokenizer.decode(pair.ids) == context + ending
        assert tokenizer.decode(pair.ids[-pair.ending :]) == context[3:] + ending, "as lm-evaluation-harness divides"

    def test_a_token_across_the_border_loses_nothing(self) -> None:
        """The whole has one token for `= y`: cut after the context's two tokens it would lose the `=`."""
        whole = Merging()("x= y")["input_ids"]
        assert len(whole) == len(Merging()("x=")["input_ids"])
        pair = encode(Merging(), "x=", "y")
        assert (pair.ids, pair.ending) == ([ord(c) for c in "x= y"], 2)

    def test_first_token_once(self) -> None:
        assert encode(Marking(), "ab", "c").ids == [1, ord("a"), ord("b"), ord(" "), ord("c")]
        assert encode(Marking(), "<s>b", "c").ids[0] == ord("<"), "the text brings its own"

    def test_equals_the_library_where_no_token_spans(self, tokenizer: Any) -> None:
        from tasks.models.text import multiple_choice

        for choice in multiple_choice()[:20]:
            for ending in choice.endings:
                ids = tokenizer(choice.context + ending)["input_ids"]
                context = tokenizer(choice.context)["input_ids"]
                assert encode(tokenizer, choice.context, ending).ids == ids
                assert encode(tokenizer, choice.context, ending).ending == len(ids) - len(context)


@pytest.fixture(scope="module")
def session(bench: Any) -> Any:
    with bench.live(bench.job(bench.cell("prefill", "fp32", bench.POCKET)), calls=0) as session:
        yield session


class TestAnswers:
    def test_one_by_one(self, session: Any) -> None:
        """Contexts and endings of very different lengths, among them one that must be cut on the left."""
        import torch

        asked = [
            Choice(context="import os\nimport", endings=("sys", "re, json, os, sys", "."), label=0),
            Choice(context="x = 1\n" * 700 + "def f(self):", endings=("return self.x", "\n    return 1"), label=1),
            Choice(context="for", endings=("i in range(10):", "while True", "x"), label=2),
        ]
        tokenizer, longest = session.loaded.tokenizer, session.loaded.config.max_position_embeddings
        assert len(tokenizer(asked[1].context, verbose=False)["input_ids"]) > longest
        expected: dict[str, list[int]] = {"answers": [], "answers_per_token": []}
        for choice in asked:
            per_character, per_token = [], []
            for ending in choice.endings:
                text = ending if ending[0] == "\n" else " " + ending
                count = len(tokenizer(text)["input_ids"])
                ids = torch.tensor([tokenizer(choice.context + text, verbose=False)["input_ids"][-longest - 1 :]])
                log_p = session.model(ids[:, :-1]).logits[0].double().log_softmax(-1)[-count:]
                total = float(log_p.gather(1, ids[0, -count:, None]).sum())
                per_character.append(total / len(ending))
                per_token.append(total / count)
            expected["answers"].append(per_character.index(max(per_character)))
            expected["answers_per_token"].append(per_token.index(max(per_token)))
        for rows in (32, 2, 1):
            found = answer(session, asked, rows)
            assert {name: found[name].tolist() for name in expected} == expected
            assert found["labels"].tolist() == [0, 1, 2]

    def test_an_ending_longer_than_the_model(self, session: Any) -> None:
        asked = [Choice(context="x", endings=("y", "z = 1\n" * 2000), label=0)]
        with pytest.raises(ChoicesError, match="question 1: an ending is longer than the model's 2048 positions"):
            answer(session, asked)

    def test_length_normalisation(self) -> None:
        """A hundred questions, of which the reference has 60 and this one 50, 45 of them in common."""
        import torch

        labels = torch.zeros(100, dtype=torch.long)
        theirs = {"answers": torch.tensor([0] * 60 + [1] * 40), "labels": labels, "floor_accuracy": torch.tensor([0.0])}
        answers = torch.tensor([0] * 45 + [1] * 15 + [0] * 5 + [1] * 35)
        found = compare_answers({"answers": answers, "answers_per_token": labels, "labels": labels}, theirs)
        assert found["accuracy"] == 0.5
        assert found["accuracy_stderr"] == pytest.approx(0.05)
        assert found["accuracy_per_token"] == 1.0
        assert found["accuracy_difference"] == pytest.approx(-0.1)
        # 5 questions won and 15 lost: variance (20 - 100 * 0.1 ** 2) / 99 of one difference
        assert found["accuracy_difference_stderr"] == pytest.approx((19 / 99 / 100) ** 0.5)
