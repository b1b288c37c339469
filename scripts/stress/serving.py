# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Stress test of the server: malformed requests, overload, clients that disconnect, and long mixed traffic.

Each trial starts device_serve.py with RUN and sends it SIGTERM at the end, after which the server must exit with 0. A trial
passes if no response is a server error (5xx), all slots are free afterwards, no request hangs, and memory growth is bounded.

examples:
  python scripts/stress/serving.py runs/quickstart
      all trials at full length: 10,000 malformed requests, 200 simultaneous requests, 20 clients that disconnect, and
      10,000 requests in 30 minutes
  python scripts/stress/serving.py runs/quickstart --trial soak --requests 500 --minutes 2 --json
      one shorter trial, printed as one JSON object
  python scripts/stress/serving.py runs/quickstart --trial schema --schemathesis ~/st/bin/st --requests 5000
      requests that schemathesis generates from the server's OpenAPI schema

exit status: 0 all trials passed, 1 one failed, 2 wrong usage
"""

import asyncio
import contextlib
import itertools
import json
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from mesh_transformer.scripts.stress.fault_injection import read_resident_bytes

from mesh_transformer.cli import DONE, FAILED, add_set_option, make_parser, run_command

ROOT = Path(__file__).parents[2]
RESPONSE_SECONDS = 120.0  # time limit after which a response counts as missing
SLOTS = 32
MAX_GROWTH_MB = 50.0  # of resident memory
NO_RESPONSE = "no response"  # in place of an HTTP status
DISCONNECTED = "disconnected"  # the client disconnected before the response


class ServerProcess:
    """Context manager that runs device_serve.py on a free port, and sends it SIGTERM at the end."""

    def __init__(self, run: str, overrides: list[str]):
        command = [sys.executable, str(ROOT / "device_serve.py"), run, "--port", "0"]
        command += [f"--set={override}" for override in overrides]
        self.command = command
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
        self.status: int | None = None  # exit status
        self.stop_seconds = 0.0  # from SIGTERM to the exit

    def __enter__(self) -> "ServerProcess":
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line.startswith("serving on"):
            raise RuntimeError(
                f"the server did not start (exit status {self.process.wait()}); run {shlex.join(self.command)} to see its error"
            )
        self.port = int(line.rsplit(":", 1)[1])
        return self

    def __exit__(self, *failure: object) -> None:
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.status = self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.stop_seconds = time.monotonic() - start

    def memory_mb(self) -> float:
        """Return the resident memory in MB."""
        resident = read_resident_bytes(self.process.pid)
        if resident is None:
            raise RuntimeError(f"the server exited during the trial with status {self.process.poll()}")
        return resident / 1e6


def main(arguments: list[str]) -> int:
    """Run the requested trials and print their results."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint, preferably of a very small model")
    parser.add_argument(
        "--trial", choices=[*TRIALS], action="append", help="trial to run; repeatable; default: all except schema"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=10_000,
        help="number of requests in the trials soak, malformed and schema; default: %(default)s",
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="duration of the trial soak in minutes; default: %(default)g"
    )
    parser.add_argument("--schemathesis", default="st", help="command that runs Schemathesis; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="seed of the requests; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_set_option(parser)
    options = parser.parse_args(arguments)
    results: dict[str, dict[str, Any]] = {}
    for name in options.trial or [name for name in TRIALS if name != "schema"]:
        overrides, trial = TRIALS[name]
        with ServerProcess(options.run, [*options.set, *overrides]) as server:
            result = asyncio.run(trial(server, options))
        result |= {"exit_status": server.status, "stop_seconds": round(server.stop_seconds, 2)}
        result["passed"] = result["passed"] and server.status == 0 and server.stop_seconds <= 10
        results[name] = result
        if not options.json:
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    if options.json:
        print(json.dumps(results))
    return DONE if all(result["passed"] for result in results.values()) else FAILED


async def malformed(server: ServerProcess, options: Namespace) -> dict[str, Any]:
    """Send malformed requests over raw sockets, 8 at a time."""
    rng = random.Random(options.seed)
    statuses = Counter()
    longest = 0
    await complete(server.port, dict(prompt="a", max_tokens=2))
    memory_before = server.memory_mb()
    start = time.monotonic()

    async def send(data: bytes) -> None:
        nonlocal longest
        response = await exchange(server.port, data)
        status = parse_status(response)
        statuses[status] += 1
        if status >= 400:
            longest = max(longest, len(response))

    for first in range(0, options.requests, 8):
        await asyncio.gather(*(send(make_malformed(rng)) for _ in range(min(8, options.requests - first))))
    growth = server.memory_mb() - memory_before
    return {
        **summarize(statuses, start),
        "longest_error_bytes": longest,
        "memory_growth_mb": round(growth, 1),
        "passed": no_server_errors(statuses)
        and longest <= 4096
        and growth < MAX_GROWTH_MB
        and await serves_requests(server),
    }


async def overload(server: ServerProcess, options: Namespace) -> dict[str, Any]:
    """Send 200 requests at once to a server with 32 slots and no queue."""
    body = dict(prompt="a", max_tokens=100, logit_bias={"256": -100}, guided_regex="[a-z]*")
    await asyncio.gather(*(complete(server.port, {**body, "max_tokens": 5}) for _ in range(SLOTS)))
    start = time.monotonic()
    latencies = []  # ms
    requests = asyncio.gather(*(complete(server.port, body) for _ in range(200)))
    while not requests.done():
        sent = time.monotonic()
        await exchange(server.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        latencies.append(1000 * (time.monotonic() - sent))
        await asyncio.sleep(0.01)
    responses = await requests
    statuses = Counter(parse_status(response) for response in responses)
    n_retry_after = sum(b"retry-after:" in response.lower() for response in responses)
    p99 = statistics.quantiles(latencies, n=100)[98] if len(latencies) > 1 else latencies[0]
    return {
        **summarize(statuses, start),
        "retry_after": n_retry_after,
        "health_p99_ms": round(p99, 1),
        "health_median_ms": round(statistics.median(latencies), 1),
        "passed": statuses == {200: SLOTS, 429: 200 - SLOTS} and n_retry_after == statuses[429],
    }


async def disconnect(server: ServerProcess, options: Namespace) -> dict[str, Any]:
    """Disconnect 20 clients as soon as all have a slot; half of them receive a stream."""
    body = dict(prompt="a", max_tokens=200, logit_bias={"256": -100}, guided_regex="[a-z]*")
    await asyncio.gather(*(complete(server.port, {**body, "max_tokens": 5}) for _ in range(20)))
    before = await read_metrics(server.port)
    all_active = asyncio.Event()
    requests = asyncio.gather(
        *(complete(server.port, {**body, "stream": i % 2 == 0}, disconnect=all_active.wait()) for i in range(20))
    )
    while (await read_metrics(server.port))["slots_used"] < 20:
        if requests.done():
            raise RuntimeError(
                f"a response arrived before all requests had a slot: {(await requests)[0][:200]!r}; "
                "pass a RUN whose model has a seq_len of at least 256"
            )
        await asyncio.sleep(0.01)
    all_active.set()
    await requests
    start = time.monotonic()
    after = await wait_until_free(server.port)
    seconds = time.monotonic() - start
    generated = after["generated_tokens_total"] - before["generated_tokens_total"]
    return {
        "seconds_until_free": round(seconds, 2),
        "generated_tokens": generated,
        "requested_tokens": 20 * 200,
        "passed": seconds < 1.0 and generated < 20 * 200,
    }


async def soak(server: ServerProcess, options: Namespace) -> dict[str, Any]:
    """Send requests of mixed sizes, spread over the given time; every fourth client disconnects early."""
    rng = random.Random(options.seed)
    statuses = Counter()
    pending = set()
    start = time.monotonic()
    memory = []  # (compiled programs, MB)

    async def send(body: dict[str, Any], seconds: float | None) -> None:
        status = NO_RESPONSE
        with contextlib.suppress(TimeoutError):
            disconnect = None if seconds is None else asyncio.sleep(seconds)
            response = await complete(server.port, body, disconnect=disconnect)
            status = parse_status(response) if seconds is None else DISCONNECTED
        statuses[status] += 1

    for number in range(options.requests):
        due = start + 60 * options.minutes * number / options.requests
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        while len(pending) >= 64:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        disconnect_after = rng.expovariate(5.0) if rng.random() < 0.25 else None
        pending.add(asyncio.ensure_future(send(make_body(rng), disconnect_after)))
        if number % max(options.requests // 40, 1) == 0:
            memory.append(((await read_metrics(server.port))["programs"], round(server.memory_mb())))
    if pending:
        await asyncio.wait(pending)
    after = await wait_until_free(server.port)
    # Compiled programs stay in memory: only intervals without a compilation count.
    growths = [after[1] - before[1] for before, after in itertools.pairwise(memory) if before[0] == after[0]]
    return {
        **summarize(statuses, start),
        "generated_tokens": after["generated_tokens_total"],
        "canceled": after["canceled_total"],
        "memory_mb": [size for _, size in memory],
        "programs": int(after["programs"]),
        "memory_growth_mb": sum(growths),
        "intervals_without_compilation": f"{len(growths)} of {len(memory) - 1}",
        "passed": no_server_errors(statuses) and len(growths) > len(memory) / 4 and sum(growths) < MAX_GROWTH_MB,
    }


async def schema(server: ServerProcess, options: Namespace) -> dict[str, Any]:
    """Run schemathesis on the server's OpenAPI schema."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [options.schemathesis, "run", f"http://127.0.0.1:{server.port}/openapi.json"]
    command += ["--checks", checks + ",negative_data_rejection", "--phases", "examples,coverage,fuzzing"]
    operations = 8
    command += ["--max-examples", str(-(-options.requests // operations)), "--no-color", "--continue-on-failure"]
    command += [
        "--request-timeout",
        str(RESPONSE_SECONDS),
        "--workers",
        "2",
        "--seed",
        str(options.seed),
        "--no-shrink",
    ]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:  # schemathesis leaves a cache in its working folder
        ran = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, cwd=folder)
    cases = sum(int(n) for n in re.findall(r"(\d+) generated", ran.stdout))
    print(ran.stdout[-6000:], file=sys.stderr)
    return {
        "cases": cases,
        "seconds": round(time.monotonic() - start),
        "schemathesis_status": ran.returncode,
        "passed": ran.returncode == 0 and await serves_requests(server),
    }


# name -> (config overrides of the server, trial)
TRIALS = {
    "malformed": ([], malformed),
    "overload": ([f"serve.slots={SLOTS}", "serve.max_queue=0"], overload),
    "disconnect": ([f"serve.slots={SLOTS}"], disconnect),
    "soak": ([], soak),
    "schema": ([], schema),
}


async def complete(port: int, body: dict[str, Any], disconnect: Awaitable[Any] | None = None) -> bytes:
    """Request a completion and return the bytes of the response; for `disconnect`, see `exchange`."""
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    tail = b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
    return await exchange(port, head + tail, disconnect=disconnect)


async def exchange(port: int, data: bytes, disconnect: Awaitable[Any] | None = None) -> bytes:
    """Send bytes and return the response until the server closes the connection; b"" if it resets the connection.

    With `disconnect`, the client disconnects when that is done, and b"" is returned. Raises TimeoutError if the server
    does not close the connection within RESPONSE_SECONDS.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if disconnect is not None:
            await disconnect
            return b""
        await writer.drain()
        if b"\r\nConnection: close\r\n" not in data:
            writer.write_eof()
        async with asyncio.timeout(RESPONSE_SECONDS):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def make_malformed(rng: random.Random) -> bytes:
    """Return a request with some bytes changed, truncated, or followed by random bytes."""
    body = json.dumps(make_body(rng)).encode()
    paths = ["/v1/completions", "/v1/chat/completions", "/complete", "/v1/models", "/", "/metrics", "*", ""]
    path = rng.choice([*paths, "/../" * rng.randint(1, 9)])
    method = rng.choice(["POST", "POST", "GET", "PUT", "OPTIONS", "PO ST", ""])
    length = rng.choice([len(body), len(body), 0, len(body) + 5, 10**12, -1, "x"])
    head = f"{method} {path} HTTP/1.{rng.choice('11119')}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += rng.choice(
        [f"Content-Length: {length}\r\n", "Transfer-Encoding: chunked\r\n", "X: " + "y" * rng.randint(0, 9000)]
    )
    data = bytearray(head.encode() + b"\r\n\r\n" + body)
    for _ in range(rng.choice([0, 0, 1, 3, 20])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.choice([len(data), rng.randint(1, len(data))])]) + rng.randbytes(rng.choice([0, 0, 40]))


def make_body(rng: random.Random) -> dict[str, Any]:
    """Return the body of a completion request of a random size."""
    body: dict[str, Any] = dict(prompt="abc " * rng.randint(0, 30), max_tokens=int(2 ** rng.uniform(0, 6.5)))
    body |= dict(stream=rng.random() < 0.5, n=rng.choice([1, 1, 1, 2, 3]), temperature=rng.choice([0, 0.7, 1.0]))
    if rng.random() < 0.2:
        body |= dict(logprobs=3, echo=rng.random() < 0.5)
    if rng.random() < 0.1:
        body |= dict(stop=["e", "\n"])
    return body


async def read_metrics(port: int) -> dict[str, float]:
    """Return the server's Prometheus metrics that have no labels, without their common prefix."""
    response = await exchange(port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    pairs = re.findall(r"^mesh_transformer_(\w+) (\S+)$", response.decode(), re.MULTILINE)
    return {name: float(value) for name, value in pairs}


async def wait_until_free(port: int) -> dict[str, float]:
    """Return the metrics once no slot is used. Raises TimeoutError if a slot is never freed."""
    async with asyncio.timeout(RESPONSE_SECONDS):
        while True:
            metrics = await read_metrics(port)
            if not metrics["slots_used"] and not metrics["open_samples"]:
                return metrics
            await asyncio.sleep(0.02)


async def serves_requests(server: ServerProcess) -> bool:
    """Return whether an ordinary request succeeds, and its slot is freed afterwards."""
    response = await complete(server.port, dict(prompt="a", max_tokens=2))
    await wait_until_free(server.port)
    return parse_status(response) == 200


def parse_status(response: bytes) -> int:
    """Return the HTTP status of a response; 0 if the server closed the connection without one."""
    found = re.match(rb"HTTP/1.1 (\d+) ", response)
    return int(found[1]) if found else 0


def no_server_errors(statuses: Counter) -> bool:
    """Return whether every request got a response other than a server error."""
    return not any(status == NO_RESPONSE or (isinstance(status, int) and status >= 500) for status in statuses)


def summarize(statuses: Counter, start: float) -> dict[str, Any]:
    """Return the counts of statuses, and the seconds since `start`."""
    return {
        "statuses": {str(status): n for status, n in sorted(statuses.items(), key=str)},
        "seconds": round(time.monotonic() - start, 1),
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
