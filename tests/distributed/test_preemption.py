# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Preemption notices of a local metadata server request a stop; other machines are not polled."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mesh_transformer.distributed import preemption
from mesh_transformer.distributed.stop import StopRequest


@pytest.fixture
def server(monkeypatch):
    """A metadata server: `values` are its answers, `requests` the (path, Metadata-Flavor header) that it received."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            http_server.requests.append((self.path, self.headers.get("Metadata-Flavor")))
            value = http_server.values.get(self.path.rpartition("/")[2])
            self.send_response(200 if value else 503)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *args):
            pass

    http_server = HTTPServer(("127.0.0.1", 0), Handler)
    http_server.values, http_server.requests = {"preempted": "FALSE", "maintenance-event": "NONE"}, []
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{http_server.server_port}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be used
    yield http_server
    http_server.shutdown()
    thread.join()
    http_server.server_close()


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize(
    ("name", "value"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_a_notice_requests_a_stop(server, capfd, name, value):
    reported = []
    with StopRequest() as stop, preemption.watch_preemption(stop, reported.append, seconds=0.01):
        server.values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
        assert wait_until(lambda: len(server.requests) > 6)
        assert not stop.requested, "a live migration does not end the machine"
        server.values[name] = value
        assert wait_until(lambda: stop.requested)
        assert stop.requested == f"notice {name} = {value}"
    assert set(server.requests) == {
        ("/computeMetadata/v1/instance/preempted", "Google"),
        ("/computeMetadata/v1/instance/maintenance-event", "Google"),
    }
    assert reported == []


def test_polling_ends_after_repeated_failures(server, monkeypatch, capfd):
    monkeypatch.setattr(preemption, "MAX_FAILURES", 5)
    reported = []
    with StopRequest() as stop, preemption.watch_preemption(stop, reported.append, seconds=0.01):
        server.values.clear()
        assert wait_until(lambda: reported)
        assert not stop.requested
    assert "503" in reported[0]
    assert "notices are unavailable" in reported[0]
    assert len(server.requests) >= 5


def test_only_google_machines_are_polled(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    product = tmp_path / "product_name"
    monkeypatch.setattr(preemption, "PRODUCT_FILE", product)
    assert preemption.find_metadata_server() == ""
    product.write_text("Standard PC\n")
    assert preemption.find_metadata_server() == ""
    product.write_text("Google Compute Engine\n")
    assert preemption.find_metadata_server() == "metadata.google.internal"
    monkeypatch.setenv("GCE_METADATA_HOST", "")
    assert preemption.find_metadata_server() == ""
