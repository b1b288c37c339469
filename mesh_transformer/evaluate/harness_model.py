# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Our models as lm-evaluation-harness wants them (its TemplateLM); nothing is ever fetched.

Import it where tasks are asked for, through `import_harness`: the harness is an optional part of an installation.
"""

import importlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import xxhash

from mesh_transformer.config import ConfigError, SampleConfig
from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.storage.resume_log import ResumeLog
from mesh_transformer.evaluate.loglikelihood import ScoringRequest, LoglikelihoodScorer
from mesh_transformer.sample.engine.engine import Engine
from mesh_transformer.sample.text_generation import complete_texts

MAX_TOKENS = 256  # of an answer, where the task does not say
ANSWERS = 64  # that are drawn before they are kept and their number is told
ProgressFn = Callable[[str, int, int | None], None]  # kind of request, done, in all


def import_harness(name: str = "lm_eval") -> Any:
    """A module of the harness; ConfigError says how to install it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a task of ours never needs the network; said before it is imported
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own progress is told
    os.environ["DISABLE_MULTIPROC"] = "1"  # its standard errors: JAX's threads do not survive a fork
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("lm_eval", "datasets", "evaluate"):
            raise ConfigError(
                f"tasks need lm-evaluation-harness ({error}): pip install 'mesh-transformer[evaluate]'"
            ) from None
        raise


def split_continuation(context: Sequence[int], continuation: Sequence[int], longest: int) -> list[ScoringRequest]:
    """Queries for a continuation behind what fits before it: one, or more where it alone is longer than the model reads.

    Each of several scores half of what the model reads, or the rest, and sees the other half.
    """
    whole, first = [*context, *continuation], len(context)
    step = len(continuation) if len(continuation) <= longest else max(longest // 2, 1)
    ends = [*range(first + step, len(whole), step), len(whole)]
    starts = [first, *ends[:-1]]
    return [ScoringRequest(whole[max(end - longest - 1, 0) : end], end - start) for start, end in zip(starts, ends, strict=True)]


def make_adapter(
    scorer: LoglikelihoodScorer,
    tokenizer: Tokenizer,
    engine: Engine | None = None,
    report: ProgressFn = lambda kind, done, total: None,
) -> Any:
    """A model of the harness. Likelihoods come from `scorer`; `engine` is needed where text is generated."""
    model, windows = import_harness("lm_eval.api.model"), import_harness("lm_eval.utils")
    longest = scorer.config.seq_len

    class MeshTransformer(model.TemplateLM):
        """Contexts that are too long lose their beginning, as in the harness's own models."""

        batch_size, max_length, tokenizer_name = 1, longest, tokenizer.fingerprint

        def __init__(self) -> None:
            super().__init__()
            self._asked: list[tuple[Any, Any]] = []
            self.cut: dict[Any, set[Any]] = defaultdict(set)  # task -> its items whose prompts lost their beginning

        @property
        def eot_token_id(self) -> int:
            return tokenizer.end_of_text

        @property
        def world_size(self) -> int:
            return 1  # several processes share every batch; to the harness they are one

        @property
        def rank(self) -> int:
            return 0

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            self._asked = [(request.task_name, request.doc_id) for request in requests]
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            queries, owners = [], []
            for number, ((context, continuation), context_ids, ids) in enumerate(requests):
                if not ids:
                    raise ConfigError(f"no tokens in the continuation {continuation!r} behind {context[-30:]!r}")
                if len(context_ids) + len(ids) > longest + 1:
                    task, item = self._asked[number]
                    self.cut[task].add(item)
                cut = split_continuation(context_ids, ids, longest)
                queries += cut
                owners += [number] * len(cut)
            found = scorer.score_totals(queries, lambda done, total: report("likelihoods", done, total))
            totals = [(0.0, True)] * len(requests)
            for number, (logprob, is_likeliest) in zip(owners, found, strict=True):
                total, greedy = totals[number]
                totals[number] = total + logprob, greedy and is_likeliest
            return totals

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            queries, owners = [], []
            for number, request in enumerate(requests):
                ids = tokenizer.encode(request.args[0])
                for window in windows.get_rolling_token_windows(ids, tokenizer.end_of_text, longest, 1):
                    context, scored = windows.make_disjoint_window(window)
                    queries.append(ScoringRequest([*context, *scored], len(scored)))
                    owners.append(number)
            found = scorer.score_totals(queries, lambda done, total: report("windows of texts", done, total))
            totals = [0.0] * len(requests)
            for number, (logprob, _) in zip(owners, found, strict=True):
                totals[number] += logprob
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            if engine is None:
                raise ConfigError("generating text needs an engine")
            return _answer(engine, tokenizer, requests, self.cut, scorer.resume_log, report)

        def get_model_info(self) -> dict[str, Any]:
            return {"model": "mesh-transformer", "max_length": longest}

    return MeshTransformer()


def _answer(
    engine: Engine,
    tokenizer: Tokenizer,
    requests: Sequence[Any],
    cut: Mapping[Any, set[Any]],
    journal: ResumeLog | None,
    report: ProgressFn,
) -> list[str]:
    """The answer to every request; those that want the same are drawn together. `cut` gets the items that are too long."""
    answers, done, longest = [""] * len(requests), 0, engine.config.seq_len
    keys = [xxhash.xxh3_128_hexdigest(json.dumps(request.args, sort_keys=True).encode()) for request in requests]
    alike: dict[str, list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        alike[json.dumps(request.args[1], sort_keys=True)].append(number)
    for numbers in alike.values():
        options, stops = _read_wishes(requests[numbers[0]].args[1], longest)
        for first in range(0, len(numbers), ANSWERS):
            some, prompts = numbers[first : first + ANSWERS], {}
            for number in some:
                request = requests[number]
                prompt, is_cut = _fit(tokenizer, request.args[0], longest - options.max_tokens)
                if is_cut:
                    cut[request.task_name].add(request.doc_id)
                known = journal.get(keys[number]) if journal else None
                if known is None:
                    prompts[number] = prompt
                else:
                    answers[number] = known
            if prompts:
                found = complete_texts(engine, tokenizer, list(prompts.values()), options, stops=stops)
                for number, completion in zip(prompts, found, strict=True):
                    answers[number] = completion.text
                    if journal:
                        journal.put(keys[number], completion.text)
            done += len(some)
            report("answers", done, len(requests))
    return answers


def _read_wishes(wishes: Mapping[str, Any], longest: int) -> tuple[SampleConfig, list[str]]:
    """How a task wants its answers, and the strings that end one; greedy unless it says do_sample."""
    is_drawn, stops = bool(wishes.get("do_sample")), wishes.get("until") or []
    options = SampleConfig(
        temperature=float(wishes.get("temperature", 1.0)) if is_drawn else 0.0,
        top_p=float(wishes.get("top_p", 1.0)) if is_drawn else 1.0,
        max_tokens=min(int(wishes.get("max_gen_toks", MAX_TOKENS)), max(longest // 2, 1)),
    )
    return options, [stops] if isinstance(stops, str) else list(stops)


def _fit(tokenizer: Tokenizer, prompt: str, room: int) -> tuple[str, bool]:
    """The prompt, or its end where it is too long, as in the harness's own models; and whether that is so."""
    ids = tokenizer.encode(prompt)
    return (tokenizer.decode(ids[-room:]), True) if len(ids) > room else (prompt, False)
