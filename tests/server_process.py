# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A server process with a small model, for tests."""

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
from prometheus_client.parser import text_string_to_metric_families

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.config import config_to_dict, parse_config
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.model.transformer import make_model

ROOT = Path(__file__).parents[1]
TOKEN = "a-token-for-the-tests-only"
SLOTS, QUEUE, MAX_BODY, BODY_SECONDS = 2, 4, 20_000, 1.5


class Server:
    """A server process and a client for it."""

    def __init__(self, folder: Path, **settings: float | str):
        limits = dict(
            slots=SLOTS,
            max_queue=QUEUE,
            max_body_bytes=MAX_BODY,
            body_timeout_seconds=BODY_SECONDS,
            drain_seconds=60.0,
            **settings,
        )
        command = [sys.executable, "device_serve.py", str(folder), "--port", "0", "--token-file", str(folder / "token")]
        command += [f"--set=serve.{name}={json.dumps(value)}" for name, value in limits.items()]
        self.errors = (folder / "stderr").open("w+")
        self.client = None
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        self.stderr = folder / "stderr"

    def wait(self):
        """Wait until the server is ready."""
        import openai  # optional: test modules skip themselves without it

        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith("serving on http://127.0.0.1:"), (line, self.stderr.read_text())
        self.port = int(line.rsplit(":", 1)[1])
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=TOKEN, max_retries=0, timeout=120
        )

    def kill(self):
        """Kill the process and close all files."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()
        self.errors.close()
        if self.client:
            self.client.close()

    def call(self, method, path, body=None, token=TOKEN, **headers):
        """Return status, headers and body, decoded if it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            if token:
                headers["Authorization"] = f"Bearer {token}"
            if isinstance(body, dict):
                body, headers["Content-Type"] = json.dumps(body), headers.get("Content-Type", "application/json")
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            data = response.read()
            is_json = response.headers.get("content-type") == "application/json"
            return response.status, response.headers, json.loads(data) if is_json else data

    def complete(self, **body):
        status, _, response = self.call("POST", "/v1/completions", body)
        assert status == 200, response
        return response

    def metric(self, name):
        """Return the sum of a metric's samples."""
        _, _, text = self.call("GET", "/metrics")
        families = text_string_to_metric_families(text.decode())
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    def raw(self, data: bytes):
        """Send bytes and return status and length of the response."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(data)
            response = http.client.HTTPResponse(connection)
            response.begin()
            return response.status, len(response.read())

    def send_and_close(self, data: bytes) -> bytes:
        """Send bytes, close the sending side, and return the response, possibly empty."""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection,
            contextlib.suppress(ConnectionError),
        ):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))
        return b""

    def wait_until_idle(self) -> float:
        """Wait until no request is running, and return the seconds."""
        start = time.monotonic()
        while self.metric("mesh_transformer_slots_used") or self.metric("mesh_transformer_open_samples"):
            assert time.monotonic() - start < 30
            time.sleep(0.05)
        return time.monotonic() - start


def save_model(folder, tokenizer, **meta):
    """Save an untrained model as the checkpoint of a run, and the server's token."""
    model = dict(n_layers=1, d_model=16, n_heads=2, n_vocab=tokenizer.n_vocab, seq_len=256)
    data = dict(train=dict(a=dict(path="a")))
    config = parse_config(dict(model=model, train=dict(steps=1, batch_size=1), data=data), where="test")
    params = jax.jit(make_model(config.model).init)(jax.random.key(0))
    params = jax.tree.map(lambda array: 12.0 * array, params)  # so that probabilities depend on the whole context
    arrays = {f"params/{name}": array for name, array in flatten_names(params).items()}
    axes = {f"params/{name}": info.axes for name, info in flatten_names(describe_params(config.model)).items()}
    store = Store(folder / "checkpoints")
    store.save(7, arrays, axes=axes, meta={"config": config_to_dict(config), "tokenizer": tokenizer.to_json(), **meta})
    store.wait()
    (folder / "token").write_text(TOKEN + "\n")
