# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Ill-treat a server and count what comes of it: malformed requests, overload, clients that leave, long mixed traffic.

Each trial starts device_serve.py with RUN and ends it by SIGTERM, which must make it exit with 0. A trial holds if no
answer is an error of the server's (5xx), no slot stays taken, nothing hangs, and memory stays within bounds.

examples:
  python scripts/stress/serving.py runs/quickstart
      all trials at full length: 10,000 malformed requests, 200 requests at once, 20 clients that leave, 10,000 over 30 minutes
  python scripts/stress/serving.py runs/quickstart --trial soak --requests 500 --minutes 2 --json
      one of them, shortened, as one JSON object
  python scripts/stress/serving.py runs/quickstart --trial schema --schemathesis ~/st/bin/st --requests 5000
      cases that schemathesis makes of the server's own OpenAPI schema

exit status: 0 all held, 1 one did not, 2 wrong usage
"""

import asyncio
import contextlib
import itertools
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from mesh_transformer.cli import DONE, FAILED, add_set_option, make_parser, run_command

ROOT = Path(__file__).parents[2]
HANG = 120.0  # seconds after which an answer counts as missing
SLOTS_AT_ONCE = 32
MOST_GROWTH = 50.0  # MB of memory


class Served:
    """A server of our own, as a context."""

    def __init__(self, run: str, settings: list[str]):
        command = [sys.executable, str(ROOT / "device_serve.py"), run, "--port", "0"]
        command += [f"--set={setting}" for setting in settings]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
        self.status: int | None = None
        self.seconds_to_end = 0.0

    def __enter__(self) -> "Served":
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line.startswith("serving on"):
            raise RuntimeError(f"the server did not start: exit status {self.process.wait()}")
        self.port = int(line.rsplit(":", 1)[1])
        return self

    def __exit__(self, *failure: object) -> None:
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.status = self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.seconds_to_end = time.monotonic() - start

    def memory(self) -> float:
        """Resident, in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * 4096 / 1e6


def main(arguments: list[str]) -> int:
    """Run the trials that are asked for, and print what they counted."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint in it, best of a very small model")
    parser.add_argument("--trial", choices=[*TRIALS], action="append", help="repeatable; default: all but schema")
    parser.add_argument("--requests", type=int, default=10_000, help="of soak, malformed and schema; default: 10000")
    parser.add_argument("--minutes", type=float, default=30.0, help="of soak; default: %(default)g")
    parser.add_argument("--schemathesis", default="st", help="its program; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of what is asked; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_set_option(parser)
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, Any]] = {}
    for name in options.trial or [name for name in TRIALS if name != "schema"]:
        settings, trial = TRIALS[name]
        with Served(options.run, [*options.set, *settings]) as served:
            found[name] = asyncio.run(trial(served, options))
        found[name] |= {"exit_status": served.status, "seconds_to_end": round(served.seconds_to_end, 2)}
        found[name]["held"] = found[name]["held"] and served.status == 0 and served.seconds_to_end <= 10
        if not options.json:
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found[name].items()), flush=True)
    if options.json:
        print(json.dumps(found))
    return DONE if all(each["held"] for each in found.values()) else FAILED


async def malformed(served: Served, options: Any) -> dict[str, Any]:
    """Bytes that are nearly requests, on raw sockets, 8 at a time."""
    rng, statuses, longest = random.Random(options.seed), Counter(), 0
    await ask(served.port, dict(prompt="a", max_tokens=2))
    before, start = served.memory(), time.monotonic()

    async def one(data: bytes) -> None:
        nonlocal longest
        answer = await exchange(served.port, data)
        statuses[_status(answer)] += 1
        longest = max(longest, len(answer) if _status(answer) >= 400 else 0)

    for first in range(0, options.requests, 8):
        await asyncio.gather(*(one(mangle(rng)) for _ in range(min(8, options.requests - first))))
    growth = served.memory() - before
    return {
        **_report(statuses, start),
        "longest_error": longest,
        "memory_growth_mb": round(growth, 1),
        "held": _sound(statuses) and longest <= 4096 and growth < MOST_GROWTH and await still_serves(served),
    }


async def overload(served: Served, options: Any) -> dict[str, Any]:
    """200 requests at once where 32 have a slot and none may wait."""
    body = dict(prompt="a", max_tokens=100, logit_bias={"256": -100}, guided_regex="[a-z]*")
    await asyncio.gather(*(ask(served.port, {**body, "max_tokens": 5}) for _ in range(SLOTS_AT_ONCE)))
    start, latencies = time.monotonic(), []
    asked = asyncio.gather(*(ask(served.port, body) for _ in range(200)))
    while not asked.done():
        sent = time.monotonic()
        await exchange(served.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        latencies.append(1000 * (time.monotonic() - sent))
        await asyncio.sleep(0.01)
    answers = await asked
    statuses = Counter(_status(answer) for answer in answers)
    told = sum(b"retry-after:" in answer.lower() for answer in answers)
    cut = statistics.quantiles(latencies, n=100)[98] if len(latencies) > 1 else latencies[0]
    return {
        **_report(statuses, start),
        "retry_after": told,
        "health_p99_ms": round(cut, 1),
        "health_median_ms": round(statistics.median(latencies), 1),
        "held": statuses == {200: SLOTS_AT_ONCE, 429: 200 - SLOTS_AT_ONCE} and told == statuses[429],
    }


async def leave(served: Served, options: Any) -> dict[str, Any]:
    """20 clients that go as soon as all have a slot, half of them with a stream."""
    body = dict(prompt="a", max_tokens=200, logit_bias={"256": -100}, guided_regex="[a-z]*")
    await asyncio.gather(*(ask(served.port, {**body, "max_tokens": 5}) for _ in range(20)))
    before = await measure(served.port)
    seated = asyncio.Event()
    asked = [ask(served.port, {**body, "stream": i % 2 == 0}, leave=seated.wait()) for i in range(20)]
    going = asyncio.gather(*asked)
    while (await measure(served.port))["slots_used"] < 20:
        if going.done():
            raise RuntimeError(
                f"answered before all had a slot: {(await going)[0][:200]!r}; give a model of seq_len 256"
            )
        await asyncio.sleep(0.01)
    seated.set()
    await going
    start = time.monotonic()
    after = await wait_until_free(served.port)
    seconds = time.monotonic() - start
    drawn = after["generated_tokens_total"] - before["generated_tokens_total"]
    return {
        "seconds_until_free": round(seconds, 2),
        "generated_tokens": drawn,
        "of": 20 * 200,
        "held": seconds < 1.0 and drawn < 20 * 200,
    }


async def soak(served: Served, options: Any) -> dict[str, Any]:
    """Traffic of mixed sizes spread over the given time, of which every fourth client leaves early."""
    rng, statuses, pending = random.Random(options.seed), Counter(), set()
    start, memory = time.monotonic(), []

    async def one(body: dict[str, Any], leave_after: float | None) -> None:
        kind = "never answered"
        with contextlib.suppress(TimeoutError):
            answer = await ask(served.port, body, leave=None if leave_after is None else asyncio.sleep(leave_after))
            kind = "left" if leave_after is not None else _status(answer)
        statuses[kind] += 1

    for number in range(options.requests):
        due = start + 60 * options.minutes * number / options.requests
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        while len(pending) >= 64:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        leaves = rng.expovariate(5.0) if rng.random() < 0.25 else None
        pending.add(asyncio.ensure_future(one(make_body(rng), leaves)))
        if number % max(options.requests // 40, 1) == 0:
            memory.append(((await measure(served.port))["programs"], round(served.memory())))
    if pending:
        await asyncio.wait(pending)
    after = await wait_until_free(served.port)
    # A program that is compiled stays: what counts is what was added while none was.
    growths = [after[1] - before[1] for before, after in itertools.pairwise(memory) if before[0] == after[0]]
    return {
        **_report(statuses, start),
        "generated_tokens": after["generated_tokens_total"],
        "cancelled": after["canceled_total"],
        "memory_mb": [size for _, size in memory],
        "programs": int(after["programs"]),
        "memory_growth_mb": sum(growths),
        "without_compiling": f"{len(growths)} of {len(memory) - 1} intervals",
        "held": _sound(statuses) and len(growths) > len(memory) / 4 and sum(growths) < MOST_GROWTH,
    }


async def schema(served: Served, options: Any) -> dict[str, Any]:
    """What schemathesis makes of the OpenAPI schema."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [options.schemathesis, "run", f"http://127.0.0.1:{served.port}/openapi.json"]
    command += ["--checks", checks + ",negative_data_rejection", "--phases", "examples,coverage,fuzzing"]
    operations = 8
    command += ["--max-examples", str(-(-options.requests // operations)), "--no-color", "--continue-on-failure"]
    command += ["--request-timeout", str(HANG), "--workers", "2", "--seed", str(options.seed), "--no-shrink"]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:  # it leaves a cache where it runs
        ran = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, cwd=folder)
    cases = sum(int(n) for n in re.findall(r"(\d+) generated", ran.stdout))
    print(ran.stdout[-6000:], file=sys.stderr)
    return {
        "cases": cases,
        "seconds": round(time.monotonic() - start),
        "status": ran.returncode,
        "held": ran.returncode == 0 and await still_serves(served),
    }


TRIALS = {
    "malformed": ([], malformed),
    "overload": ([f"serve.slots={SLOTS_AT_ONCE}", "serve.max_queue=0"], overload),
    "leave": ([f"serve.slots={SLOTS_AT_ONCE}"], leave),
    "soak": ([], soak),
    "schema": ([], schema),
}


async def ask(port: int, body: dict[str, Any], leave: Awaitable[Any] | None = None) -> bytes:
    """All bytes of the answer to a completion, or nothing from a client that leaves."""
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    tail = b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
    return await exchange(port, head + tail, leave=leave)


async def exchange(port: int, data: bytes, leave: Awaitable[Any] | None = None) -> bytes:
    """Send bytes and read until the server closes; b"" if it resets. TimeoutError if it never does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if leave is not None:
            await leave
            return b""
        await writer.drain()
        if b"\r\nConnection: close\r\n" not in data:
            writer.write_eof()
        async with asyncio.timeout(HANG):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def mangle(rng: random.Random) -> bytes:
    """A request with some of its bytes changed, cut short, or with noise behind it."""
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
    """A completion of a random size."""
    body: dict[str, Any] = dict(prompt="abc " * rng.randint(0, 30), max_tokens=int(2 ** rng.uniform(0, 6.5)))
    body |= dict(stream=rng.random() < 0.5, n=rng.choice([1, 1, 1, 2, 3]), temperature=rng.choice([0, 0.7, 1.0]))
    if rng.random() < 0.2:
        body |= dict(logprobs=3, echo=rng.random() < 0.5)
    if rng.random() < 0.1:
        body |= dict(stop=["e", "\n"])
    return body


async def measure(port: int) -> dict[str, float]:
    """The server's own numbers without labels."""
    answer = await exchange(port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    pairs = re.findall(r"^mesh_transformer_(\w+) (\S+)$", answer.decode(), re.MULTILINE)
    return {name: float(value) for name, value in pairs}


async def wait_until_free(port: int) -> dict[str, float]:
    """The numbers once nothing is being drawn. TimeoutError if a slot stays taken."""
    async with asyncio.timeout(HANG):
        while True:
            numbers = await measure(port)
            if not numbers["slots_used"] and not numbers["open_samples"]:
                return numbers
            await asyncio.sleep(0.02)


async def still_serves(served: Served) -> bool:
    """Whether an ordinary request is answered, and no slot is taken afterwards."""
    answer = await ask(served.port, dict(prompt="a", max_tokens=2))
    await wait_until_free(served.port)
    return _status(answer) == 200


def _status(answer: bytes) -> int:
    found = re.match(rb"HTTP/1.1 (\d+) ", answer)
    return int(found[1]) if found else 0  # 0: closed without a word, as where no request was to be made out


def _sound(statuses: Counter) -> bool:
    return not any(status == "never answered" or (isinstance(status, int) and status >= 500) for status in statuses)


def _report(statuses: Counter, start: float) -> dict[str, Any]:
    return {
        "statuses": {str(status): n for status, n in sorted(statuses.items(), key=str)},
        "seconds": round(time.monotonic() - start, 1),
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
