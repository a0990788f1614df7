"""Secrets of the environment stay out of whatever is kept."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.secrets import Secrets

TOKEN = "hf_abcdefghijklmnop"


def test_values_of_variables_named_like_secrets() -> None:
    secrets = Secrets(
        {"HOME": "/nowhere", "HF_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": f"{TOKEN}/longer", "LANG": "C.UTF-8-long"}
    )
    assert secrets.hide(f"a {TOKEN}/longer b {TOKEN}") == "a <AWS_SECRET_ACCESS_KEY> b <HF_TOKEN>"
    assert secrets.hide("C.UTF-8-long") == "C.UTF-8-long"


def test_switches_and_paths_are_no_secrets(tmp_path: Path) -> None:
    key = tmp_path / "key-file.json"
    key.write_text("{}")
    given = {"HOME": "/nowhere", "RAY_AUTH_MODE": "token", "TOKENIZERS_PARALLELISM": "false", "SSH_AUTH_SOCK": str(key)}
    text = f"token false {key}"
    assert Secrets(given).hide(text) == text


def test_passwords_in_urls() -> None:
    secrets = Secrets({"HOME": "/nowhere", "HTTPS_PROXY": "http://me:correct-horse@proxy:3128"})
    assert secrets.hide("via http://me:correct-horse@proxy") == "via http://me:<HTTPS_PROXY>@proxy"


def test_saved_tokens(tmp_path: Path) -> None:
    for folder, name in ((".cache/huggingface", "token"), (".ray", "auth_token")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text(f"{folder}-{TOKEN}\n")
    secrets = Secrets({"HOME": str(tmp_path)})
    assert secrets.hide(f".cache/huggingface-{TOKEN} .ray-{TOKEN}") == "<HF_TOKEN> <RAY_AUTH_TOKEN>"


def test_json_stays_json() -> None:
    value = 'quote"back\\slash-and-more'
    secrets = Secrets({"HOME": "/nowhere", "API_KEY": value})
    hidden = secrets.hide(json.dumps({"reason": f"401 for {value}"}))
    assert json.loads(hidden) == {"reason": "401 for <API_KEY>"}
