# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Google's machines say beforehand that they will be taken away; their metadata server is asked, and a run told.

It is asked on Google's machines, and wherever GCE_METADATA_HOST names a server (host or host:port, as Google's own
libraries read it); GCE_METADATA_HOST= (empty) turns it off. A spot machine is `preempted` 30 s before its end, a TPU or
GPU machine's `maintenance-event` says TERMINATE_ON_HOST_MAINTENANCE up to an hour before. A migration is no reason to
stop: it ends nothing.
"""

import os
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

from mesh_transformer.distributed.stop import StopRequest

HOST, PRODUCT = "metadata.google.internal", Path("/sys/class/dmi/id/product_name")
SECONDS = 1.0  # between two questions; a spot machine leaves 30
GIVE_UP = 60  # failures in a row, after which the server is taken not to be there
NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is the machine's own


@contextmanager
def watch_notices(stop: StopRequest, report: Callable[[str], None], *, seconds: float = SECONDS) -> Iterator[None]:
    """In it `stop` is requested when the machine is to be taken away; nothing happens where no server is known."""
    host = find_server()
    over = threading.Event()

    def watch() -> None:
        failures = 0
        while not over.wait(seconds):
            try:
                notice = read_notice(host)
            except (URLError, OSError, ValueError) as error:
                failures += 1
                if failures == GIVE_UP:
                    return report(f"http://{host} does not answer ({error}); maintenance will come unannounced")
            else:
                failures = 0
                if notice:
                    return stop.request(notice)

    thread = threading.Thread(target=watch, name="notices", daemon=True)
    if host:
        thread.start()
    try:
        yield
    finally:
        over.set()


def find_server() -> str:
    """Host of the metadata server; empty where there is none."""
    if "GCE_METADATA_HOST" in os.environ:
        return os.environ["GCE_METADATA_HOST"]
    try:
        product = PRODUCT.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return HOST if product.startswith("Google") else ""


def read_notice(host: str) -> str:
    """What the machine's end is announced as; empty if it is not. Raises URLError, OSError or ValueError without an answer."""
    for name, value in NOTICES.items():
        url = f"http://{host}/computeMetadata/v1/instance/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with DIRECT.open(request, timeout=5) as answer:
            found = answer.read(200).decode(errors="replace").strip()
        if found == value:
            return f"notice {name} = {found}"
    return ""
