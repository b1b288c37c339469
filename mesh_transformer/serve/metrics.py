# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of the server, in a separate registry."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mesh_transformer.serve.engine_thread import EngineThread

PREFIX = "mesh_transformer"
# Upper bounds of the histogram buckets.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class ServerMetrics:
    """Counters that requests increment, and gauges that are read from the engine thread on each scrape."""

    def __init__(self, engine_thread: EngineThread):
        self._registry = CollectorRegistry()
        options: dict[str, Any] = dict(namespace=PREFIX, registry=self._registry)
        self.requests = Counter("requests", "HTTP responses", ["path", "status"], **options)
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens", **options)
        self.generated_tokens = Counter("generated_tokens", "Generated tokens", **options)
        # the names of vLLM
        self.draft_tokens = Counter("spec_decode_num_draft_tokens", "Draft tokens that the model verified", **options)
        self.accepted_tokens = Counter("spec_decode_num_accepted_tokens", "Draft tokens that it accepted", **options)
        self.canceled = Counter("canceled", "Completions canceled before their end", **options)
        self.first_token = Histogram(
            "first_token_seconds", "Time to the first token of a completion", buckets=SECONDS, **options
        )
        self.seconds = Histogram("completion_seconds", "Time to the end of a completion", buckets=SECONDS, **options)
        engine = engine_thread.engine
        for name, text, read in (
            ("slots", "Sequences that can be decoded at once", lambda: engine.slots),
            ("slots_used", "Sequences being decoded", lambda: engine_thread.n_active),
            ("queue", "Sequences that wait for a slot or are in prefill", lambda: engine_thread.n_queued),
            ("open_samples", "Samples of unfinished requests", lambda: engine_thread.n_pending),
            ("programs", "Compilations so far", lambda: sum(engine.compilations.values())),
            ("tokens_per_second", "Generated tokens per second, last 10 s", engine_thread.tokens_per_second),
            ("reused_prompt_tokens", "Prompt tokens from the prefix cache", lambda: engine.prefix_cache.reused_tokens),
        ):
            Gauge(name, text, **options).set_function(read)

    def expose(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)
