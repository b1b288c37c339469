# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Models by their name on the Hugging Face Hub, with its real client and a small server of its protocol on loopback."""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = {"config.json": b"{}", "model.safetensors": b"the weights", "tokenizer.json": b"{}", "onnx/model.onnx": b"no"}
OLD_MODEL = {"config.json": b"{}", "pytorch_model.bin": b"weights"}
REPOSITORIES = {"org/name": MODEL, "org/old": OLD_MODEL}
FIND = "import sys; from mesh_transformer.convert.sources import find_source; print(find_source(sys.argv[1]))"


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of snapshot_download: the files of a revision, and each file."""

    requests: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.requests.append(f"{self.command} {self.path} {self.headers.get('authorization', '')}".strip())
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = REPOSITORIES.get("/".join(parts[2:4]))
            revision = parts[5] if len(parts) > 5 else "main"
            if "/".join(parts[2:4]) == "org/gated":
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if files is None:
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if revision not in ("main", "v1", COMMIT):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if "tree" in parts:
                tree = [
                    dict(type="file", path=name, size=len(body), oid=f"{len(body):040x}")
                    for name, body in files.items()
                ]
                return self.answer(200, json.dumps(tree).encode())
            siblings = [{"rfilename": name} for name in files]
            return self.answer(
                200, json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings}).encode()
            )
        body = REPOSITORIES["/".join(parts[:2])]["/".join(parts[4:])]
        return self.answer(200, body, {"ETag": f'"{len(body):040x}"', "X-Repo-Commit": COMMIT})

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    """The environment of a client of the server, and the requests it got."""
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    handler = type("Handler", (Hub,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT),
        }
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            environment.pop(name, None)
        yield environment, handler.requests
        with contextlib.suppress(OSError):
            server.shutdown()


def find(name, environment, program=FIND, **more):
    return subprocess.run(
        [sys.executable, "-c", program, name],
        env={**environment, **more},
        cwd=environment["HF_HOME"].removesuffix("/home"),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_repository_is_downloaded_once_and_found_offline(hub):
    environment, requests = hub
    found = find("org/name@v1", environment, HF_TOKEN="secret-token")
    assert found.returncode == 0, found.stderr
    folder = Path(found.stdout.strip())
    assert sorted(file.name for file in folder.rglob("*") if file.is_file()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == b"the weights"
    assert any(request.endswith("Bearer secret-token") for request in requests)
    requests.clear()
    again = find("hf://org/name@v1", environment, HF_HUB_OFFLINE="1")
    assert Path(again.stdout.strip()) == folder
    assert not requests
    missing = find("org/other", environment, HF_HUB_OFFLINE="1")
    assert "org/other: not in the local cache, and the Hub cannot be reached" in missing.stderr


@pytest.mark.slow
def test_a_plan_downloads_no_weights(hub):
    environment, requests = hub
    program = FIND.replace("sys.argv[1])", "sys.argv[1], config_only=True)")
    assert program != FIND
    found = find("org/name", environment, program=program)
    assert [file.name for file in Path(found.stdout.strip()).iterdir()] == ["config.json"]
    assert not any("safetensors" in request for request in requests)


@pytest.mark.slow
def test_a_repository_without_safetensors_gives_its_bin_files(hub):
    found = find("org/old", hub[0])
    assert sorted(file.name for file in Path(found.stdout.strip()).iterdir()) == ["config.json", "pytorch_model.bin"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", "org/none: no such repository on the Hub, or it is private; check the name, or set HF_TOKEN"),
        ("org/name@v9", "org/name: no revision 'v9'; give a branch, tag or commit of the repository"),
        (
            "org/gated",
            "org/gated: this repository requires approval; request access on its page on the Hub, then set HF_TOKEN",
        ),
        ("hf://one", 'one: not the name of a repository on the Hub; give "org/model" or "org/model@revision"'),
    ],
)
def test_what_the_hub_refuses_is_an_error_with_a_remedy(hub, name, message):
    found = find(name, hub[0])
    assert found.returncode == 1
    assert message in found.stderr
