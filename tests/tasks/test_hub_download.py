"""Several runners of one node ask for one hub checkpoint at the same moment: it travels once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CONTENT = b'{"model_type": "llama"}' + b" " * 10_000
COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a file's download needs; slow, so that the others come meanwhile."""

    counts: Counter[str] = Counter()

    def _answer(self, body: bytes) -> None:
        self.counts[f"{self.command} {self.path}"] += 1
        self.send_response(200)
        for name, value in (("ETag", '"etag1"'), ("X-Repo-Commit", COMMIT), ("Content-Length", str(len(CONTENT)))):
            self.send_header(name, value)
        self.end_headers()
        if body:
            time.sleep(3.0)
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(CONTENT)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.counts.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_is_downloaded_once_per_node(hub: str, tmp_path: Path) -> None:
    code = "from huggingface_hub import hf_hub_download as get; print(open(get('org/name', 'config.json')).read(10))"
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    environment = {**kept, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    runners = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, stdout=-1, stderr=-1)
        for _ in range(3)
    ]
    for runner in runners:
        stdout, stderr = runner.communicate(timeout=120)
        assert stdout.strip() == '{"model_ty', stderr[-800:]
    file = "/org/name/resolve/main/config.json"
    assert Hub.counts[f"HEAD {file}"] >= 3, "not all of them asked, so this shows nothing"
    assert Hub.counts[f"GET {file}"] == 1
