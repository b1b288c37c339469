# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Proxy in front of an object-store server: logs requests, and fails or cuts connections by a rule."""

import contextlib
import http.client
import http.server
import re
import threading
import time

ERROR = "<?xml version='1.0' encoding='utf-8'?><Error><Code>{0}</Code><Message>{0}</Message></Error>"
CODES = {403: "AccessDenied", 429: "SlowDown", 500: "InternalError", 503: "ServiceUnavailable"}


class Handler(http.server.BaseHTTPRequestHandler):
    """Forwards a request, unless the current rule fails it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one write

    def log_message(self, *_):
        pass

    def handle_expect_100(self):
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def forward(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        action = self.server.rule(self.command, self.path)
        if action == "stall":
            time.sleep(0.3)
        if action in ("cut", "stall"):
            self.server.log.append((self.command, self.path, action, 0))
            self.close_connection = True
            return
        if action in CODES:
            status, headers, data = action, {}, ERROR.format(CODES[action]).encode()
        else:
            with self.server.connections:
                connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                status, headers, data = answer.status, dict(answer.getheaders()), answer.read()
                connection.close()
            if (
                "/storage/v1/" in self.path
            ):  # Google Cloud Storage returns the generation of an object; the emulator does not
                headers["X-Goog-Generation"] = "1"
            last = re.fullmatch(r"bytes=-(\d+)", self.headers.get("Range", ""))
            if last and status == 200:  # stores support suffix ranges; the emulators do not
                size, data = len(data), data[-int(last[1]) :]
                status, headers["Content-Range"] = 206, f"bytes {size - len(data)}-{size - 1}/{size}"
        self.server.log.append((self.command, self.path, status, len(data)))
        self.send_response_only(status)
        length = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if action == "half" else data)
        self.close_connection = action == "half"

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward


class Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # further connections wait for a second

    def __init__(self, upstream_port):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream_port = upstream_port
        self.connections = threading.Semaphore(4)  # the server's own queue is short
        self.reset()

    def reset(self):
        self.log = []
        self.rule = lambda method, path: None

    def handle_error(self, *_):
        """Ignore clients that were killed or disconnected."""

    def count(self, method, pattern):
        return sum(entry[0] == method and bool(re.search(pattern, entry[1])) for entry in self.log)


@contextlib.contextmanager
def run_proxy(upstream_port):
    """Run a proxy to a local port in a thread."""
    with Proxy(upstream_port) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        yield proxy
        proxy.shutdown()
        thread.join()
