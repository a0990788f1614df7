"""Make pocket, the 4.5-million-parameter Llama that ships with the project: its text, its questions, its weights."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tasks.models.make_pocket_text import SEED, make_choices, make_text
from tasks.models.training import Settings, train


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
