# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Adapter that gives a model the TemplateLM interface of lm-evaluation-harness.

Importing this module imports the harness, which is an optional dependency: import it only when harness tasks are run.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from mesh_transformer.config import ConfigError, SampleConfig
from mesh_transformer.evaluate.harness_tasks import import_harness
from mesh_transformer.evaluate.loglikelihood import LoglikelihoodScorer, ScoringRequest
from mesh_transformer.reports.console import ProgressFn
from mesh_transformer.sample.engine.engine import Engine
from mesh_transformer.sample.model_defaults import ModelDefaults
from mesh_transformer.sample.text_generation import complete_texts

DEFAULT_MAX_TOKENS = 256  # tokens of an answer, if the task does not set max_gen_toks
GENERATION_BATCH = 64  # answers that are generated together, then stored and reported as progress

TemplateLM: Any = import_harness("lm_eval.api.model").TemplateLM
harness_utils: Any = import_harness("lm_eval.utils")


class HarnessModel(TemplateLM):
    """Model for the harness. It adds special tokens and truncates contexts as HFLM does, the harness's Hugging Face model."""

    batch_size = 1

    def __init__(
        self,
        scorer: LoglikelihoodScorer,
        defaults: ModelDefaults,
        engine: Engine | None = None,
        on_progress: ProgressFn = lambda kind, done, total: None,
    ) -> None:
        """`engine` may be None if no task generates text."""
        super().__init__()
        self.truncated: dict[Any, set[Any]] = defaultdict(set)  # task -> ids of examples whose prompts were truncated
        self._scorer = scorer
        self._defaults = defaults
        # HFLM also ends answers at the tokenizer's end-of-text token.
        eos_token_ids = dict.fromkeys((*defaults.eos_token_ids, defaults.tokenizer.end_of_text))
        self._generation_defaults = dataclasses.replace(defaults, eos_token_ids=tuple(eos_token_ids))
        self._tokenizer = defaults.tokenizer
        self._engine = engine
        self._on_progress = on_progress
        self._examples: list[tuple[Any, Any]] = []  # name of the task and id of the example of each request

    @property
    def max_length(self) -> int:
        return self._scorer.config.seq_len

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        return self._defaults.prefix_token_id

    @property
    def world_size(self) -> int:
        return 1  # every batch is sharded over all processes here, so the harness must not divide the requests

    @property
    def rank(self) -> int:
        return 0

    def get_model_info(self) -> dict[str, Any]:
        return {"model": "mesh-transformer", "max_length": self.max_length}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        from_files, bos = self._defaults.from_files, self._tokenizer.begin_of_text
        ids = self._tokenizer.encode(
            string, add_special_tokens=from_files and add_special_tokens is not False, parse_special=from_files
        )
        has_two_bos = add_special_tokens is None and bos is not None and ids[:2] == [bos, bos]
        return ids[1:] if has_two_bos else ids  # as in HFLM, no second BOS token

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._examples = [(request.task_name, request.doc_id) for request in requests]
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        chunks: list[ScoringRequest] = []
        owners: list[int] = []  # index of the harness's request to which each chunk belongs
        for number, ((context, continuation), context_ids, ids) in enumerate(requests):
            task, example = self._examples[number]
            if not ids:
                raise ConfigError(
                    f"task {task}, example {example}: the continuation {continuation!r} of {context[-30:]!r} has no tokens; it "
                    "needs at least 1; correct the example in the data file"
                )
            if len(context_ids) + len(ids) > self.max_length + 1:
                self.truncated[task].add(example)
            request_chunks = split_continuation(context_ids, ids, self.max_length)
            chunks += request_chunks
            owners += [number] * len(request_chunks)
        totals = [(0.0, True)] * len(requests)
        for number, (logprob, is_greedy) in zip(owners, self._score("log-likelihoods", chunks), strict=True):
            total, all_greedy = totals[number]
            totals[number] = total + logprob, all_greedy and is_greedy
        return totals

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[ScoringRequest] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in harness_utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, scored = harness_utils.make_disjoint_window(window)
                windows.append(ScoringRequest([*context, *scored], len(scored)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._score("text windows", windows), strict=True):
            totals[number] += logprob
        return totals

    def _score(self, name: str, requests: Sequence[ScoringRequest]) -> list[tuple[float, bool]]:
        return self._scorer.score_totals(requests, lambda done, total: self._on_progress(name, done, total))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        if self._engine is None:
            raise ConfigError(
                f"task {requests[0].task_name} generates text, which needs a sampling engine; run it with "
                "device_evaluate.py"
            )
        by_params: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_params[json.dumps(request.args[1], sort_keys=True)].append(number)
        answers: dict[int, str] = {}
        for numbers in by_params.values():
            for first in range(0, len(numbers), GENERATION_BATCH):
                batch = numbers[first : first + GENERATION_BATCH]
                answers |= self._generate(self._engine, {number: requests[number] for number in batch})
                self._on_progress("answers", len(answers), len(requests))
        return [answers[number] for number in range(len(requests))]

    def _generate(self, engine: Engine, requests: Mapping[int, Any]) -> dict[int, str]:
        """Return the answers to requests with equal sampling parameters; answers in the resume log are reused."""
        log = self._scorer.resume_log
        options, stops = _generation_kwargs(
            next(iter(requests.values())).args[1], self.max_length, self._defaults.sampling
        )
        answers: dict[int, str] = {}
        prompts: dict[int, str | list[int]] = {}
        for number, request in requests.items():
            ids = self.tok_encode(request.args[0])
            max_prompt_tokens = self.max_length - options.max_tokens
            if len(ids) > max_prompt_tokens:
                self.truncated[request.task_name].add(request.doc_id)
            known = log.get(_digest(request)) if log else None
            if known is None:
                prompts[number] = ids[-max_prompt_tokens:] or ""
            else:
                answers[number] = known
        if prompts:
            completions = complete_texts(
                engine, self._generation_defaults, list(prompts.values()), options, stops=stops
            )
            for number, completion in zip(prompts, completions, strict=True):
                answers[number] = completion.text
                if log:
                    log.add(_digest(requests[number]), completion.text)
        return answers


def split_continuation(context: Sequence[int], continuation: Sequence[int], max_length: int) -> list[ScoringRequest]:
    """Return requests that together score a continuation, with as much of the context before it as fits.

    A continuation longer than `max_length` is split into requests that score max_length / 2 tokens each, given the
    max_length / 2 + 1 tokens before these.
    """
    tokens = [*context, *continuation]
    first = len(context)
    step = len(continuation) if len(continuation) <= max_length else max(max_length // 2, 1)
    ends = [*range(first + step, len(tokens), step), len(tokens)]
    starts = [first, *ends[:-1]]
    return [
        ScoringRequest(tokens[max(end - max_length - 1, 0) : end], end - start)
        for start, end in zip(starts, ends, strict=True)
    ]


def _generation_kwargs(
    kwargs: Mapping[str, Any], max_length: int, sampling: Mapping[str, Any]
) -> tuple[SampleConfig, list[str]]:
    """Return the sampling parameters and stop strings of a task; decoding is greedy unless the task sets do_sample.

    `sampling` holds the defaults of the model's generation_config.json.
    """
    do_sample = bool(kwargs.get("do_sample"))
    stops = kwargs.get("until") or []
    fields = dict(sampling)
    fields["max_tokens"] = min(int(kwargs.get("max_gen_toks", DEFAULT_MAX_TOKENS)), max(max_length // 2, 1))
    if do_sample:
        fields["temperature"] = float(kwargs.get("temperature", fields.get("temperature", 1.0)))
        fields["top_p"] = float(kwargs.get("top_p", fields.get("top_p", 1.0)))
    else:
        fields["temperature"] = 0.0
    return SampleConfig(**fields), [stops] if isinstance(stops, str) else list(stops)


def _digest(request: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(request.args, sort_keys=True).encode())
