# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Preemption and maintenance notices of Google Cloud machines, polled from their metadata server.

The server is polled on Google's machines and wherever GCE_METADATA_HOST is set (to host or host:port, as in Google's
libraries); GCE_METADATA_HOST= (empty) disables polling. The server reports a spot machine as `preempted` 30 s before the
machine ends. The `maintenance-event` of a TPU or GPU machine is TERMINATE_ON_HOST_MAINTENANCE up to an hour before the
machine ends. A live migration does not end the machine, so it does not stop the run.
"""

import os
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

from mesh_transformer.distributed.stop import StopRequest

METADATA_HOST = "metadata.google.internal"
PRODUCT_FILE = Path("/sys/class/dmi/id/product_name")
POLL_SECONDS = 1.0  # time between two polls; a spot machine has 30 s left after its notice
MAX_FAILURES = 60  # consecutive failed requests after which polling ends
# Name of a metadata value -> content that announces the end of the machine.
NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: the server is local


@contextmanager
def watch_preemption(stop: StopRequest, log: Callable[[str], None], *, seconds: float = POLL_SECONDS) -> Iterator[None]:
    """Context manager that polls the metadata server and requests a stop on a notice; does nothing without a server."""
    host = find_metadata_server()
    ended = threading.Event()

    def poll() -> None:
        failures = 0
        while not ended.wait(seconds):
            try:
                notice = read_notice(host)
            except (URLError, OSError, ValueError) as error:
                failures += 1
                if failures == MAX_FAILURES:
                    return log(
                        f"the metadata server http://{host} did not answer {failures} requests in a row ({error}); preemption "
                        "notices are unavailable; set GCE_METADATA_HOST to its address, or to an empty value to disable polling"
                    )
            else:
                failures = 0
                if notice:
                    return stop.request(notice)

    thread = threading.Thread(target=poll, name="preemption", daemon=True)
    if host:
        thread.start()
    try:
        yield
    finally:
        ended.set()


def find_metadata_server() -> str:
    """Return the host of the metadata server, or "" if the machine has none."""
    if "GCE_METADATA_HOST" in os.environ:
        return os.environ["GCE_METADATA_HOST"]
    try:
        product = PRODUCT_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return METADATA_HOST if product.startswith("Google") else ""


def read_notice(host: str) -> str:
    """Return the current notice, or "" without a notice. Raises URLError, OSError or ValueError if the server does not answer."""
    for name, value in NOTICES.items():
        url = f"http://{host}/computeMetadata/v1/instance/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with _OPENER.open(request, timeout=5) as response:
            content = response.read(200).decode(errors="replace").strip()
        if content == value:
            return f"notice {name} = {content}"
    return ""
