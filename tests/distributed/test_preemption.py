# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A metadata server on this machine announces the end, and the run is asked to stop; elsewhere nothing is asked."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mesh_transformer.distributed import preemption
from mesh_transformer.distributed.stop import StopRequest


@pytest.fixture
def server(monkeypatch):
    """`server.values`: what it answers; `server.asked`: the paths, with Google's header or without."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            held.asked.append((self.path, self.headers.get("Metadata-Flavor")))
            value = held.values.get(self.path.rpartition("/")[2])
            self.send_response(200 if value else 503)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *args):
            pass

    held = HTTPServer(("127.0.0.1", 0), Handler)
    held.values, held.asked = {"preempted": "FALSE", "maintenance-event": "NONE"}, []
    thread = threading.Thread(target=held.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{held.server_port}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be used
    yield held
    held.shutdown()
    thread.join()
    held.server_close()


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize(
    ("name", "value"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_an_announced_end_is_a_request(server, capfd, name, value):
    said = []
    with StopRequest() as stop, preemption.watch_notices(stop, said.append, seconds=0.01):
        server.values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
        assert wait_until(lambda: len(server.asked) > 6)
        assert not stop.requested, "a migration ends nothing"
        server.values[name] = value
        assert wait_until(lambda: stop.requested)
        assert stop.requested == f"notice {name} = {value}"
    assert set(server.asked) == {
        ("/computeMetadata/v1/instance/preempted", "Google"),
        ("/computeMetadata/v1/instance/maintenance-event", "Google"),
    }
    assert said == []


def test_a_server_that_fails_is_asked_again_and_at_last_given_up(server, monkeypatch, capfd):
    monkeypatch.setattr(notices, "GIVE_UP", 5)
    said = []
    with StopRequest() as stop, preemption.watch_notices(stop, said.append, seconds=0.01):
        server.values.clear()
        assert wait_until(lambda: said)
        assert not stop.requested
    assert "503" in said[0]
    assert "unannounced" in said[0]
    assert len(server.asked) >= 5


def test_only_googles_machines_are_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    product = tmp_path / "product_name"
    monkeypatch.setattr(notices, "PRODUCT", product)
    assert preemption.find_server() == ""
    product.write_text("Standard PC\n")
    assert preemption.find_server() == ""
    product.write_text("Google Compute Engine\n")
    assert preemption.find_server() == "metadata.google.internal"
    monkeypatch.setenv("GCE_METADATA_HOST", "")
    assert preemption.find_server() == ""
