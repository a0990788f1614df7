"""The secret values that this process knows, so that nothing that is kept or shown holds one of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

_WORDS = ("TOKEN", "KEY", "SECRET", "PASSW", "CREDENTIAL", "AUTH")
_PASSWORD_IN_URL = re.compile(r"://[^/@:\s]*:([^/@\s]+)@")
# Shorter values are modes and switches: replacing every `token` or `1` in a log would hide the log.
_SHORTEST = 8


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name could hold a secret."""
    return any(word in name.upper() for word in _WORDS)


class Secrets:
    """What to hide: values of variables named like secrets, passwords in URLs, and saved tokens of the hub and Ray."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        variables = os.environ if environment is None else environment
        found: dict[str, str] = {}
        for name, value in variables.items():
            if is_secret_name(name) and not _is_path(value):
                found[value] = name
            for password in _PASSWORD_IN_URL.findall(value):
                found[password] = name
        for name, path in _token_files(variables):
            try:
                found.setdefault(path.read_text().strip(), name)
            except (OSError, ValueError):
                continue
        escaped = {json.dumps(value)[1:-1]: name for value, name in found.items()}
        values = {value: name for value, name in (found | escaped).items() if len(value.strip()) >= _SHORTEST}
        self._values = sorted(values.items(), key=lambda item: len(item[0]), reverse=True)

    def hide(self, text: str) -> str:
        """The text, also JSON, with each secret replaced by its variable's name in angle brackets."""
        for value, name in self._values:
            text = text.replace(value, f"<{name}>")
        return text


def _token_files(variables: Mapping[str, str]) -> list[tuple[str, Path]]:
    home = Path(variables.get("HOME") or Path.home())
    hub = Path(variables.get("HF_HOME") or home / ".cache" / "huggingface")
    return [
        ("HF_TOKEN", Path(variables.get("HF_TOKEN_PATH") or hub / "token")),
        ("RAY_AUTH_TOKEN", Path(variables.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")),
    ]


def _is_path(value: str) -> bool:
    try:
        return os.sep in value and Path(value).exists()
    except (OSError, ValueError):
        return False
