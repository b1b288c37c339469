# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Numbers for Prometheus, in a registry of the server's own."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mesh_transformer.serve.engine_thread import EngineThread

PREFIX = "mesh_transformer"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class ServerMetrics:
    """Counters that requests move, and gauges read from the engine's thread when somebody looks."""

    def __init__(self, worker: EngineThread):
        self._registry = CollectorRegistry()
        make: dict[str, Any] = dict(namespace=PREFIX, registry=self._registry)
        self.requests = Counter("requests", "Answered requests", ["path", "status"], **make)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **make)
        self.tokens = Counter("drawn_tokens", "Tokens drawn for requests", **make)
        self.cancelled = Counter("cancelled", "Completions given up before their end", **make)
        self.first_token = Histogram(
            "first_token_seconds", "From a completion's start to its first token", buckets=SECONDS, **make
        )
        self.seconds = Histogram("completion_seconds", "From a completion's start to its end", buckets=SECONDS, **make)
        prefixes = worker.engine.prefix_cache
        for name, text, read in (
            ("slots", "Samples that can be decoded at once", lambda: worker.engine.slots),
            ("slots_used", "Samples being decoded", lambda: worker.seated),
            ("queue", "Samples that wait for a slot or whose prompts are being read", lambda: worker.queued),
            ("open_samples", "Samples somebody waits for", lambda: worker.n_open),
            ("programs", "Programs compiled so far", lambda: sum(worker.engine.compilations.values())),
            ("tokens_per_second", "Tokens drawn, over the last ten seconds", worker.tokens_per_second),
            (
                "reused_prompt_tokens",
                "Tokens of prompts that did not have to be read again",
                lambda: prefixes.reused_tokens,
            ),
        ):
            Gauge(name, text, **make).set_function(read)

    def expose(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
