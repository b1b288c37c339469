# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Our models as lm-evaluation-harness wants them (its TemplateLM), and its tasks from items in memory: nothing is fetched.

Import it where tasks are asked for, through `import_harness`: the harness is an optional part of an installation.
"""

import contextlib
import dataclasses
import importlib
import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mesh_transformer.config import ConfigError, SampleConfig
from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.evaluate.likelihood import Query, Scorer
from mesh_transformer.evaluate.tasks import TASKS
from mesh_transformer.sample.engine import Engine
from mesh_transformer.sample.text import complete_texts

MAX_TOKENS = 256  # of an answer, where the task does not say
METRICS: dict[str, dict[str, Any]] = {
    "acc": dict(aggregation="mean", higher_is_better=True),
    "acc_norm": dict(aggregation="mean", higher_is_better=True),
    "exact_match": dict(aggregation="mean", higher_is_better=True),
    "perplexity": dict(aggregation="perplexity", higher_is_better=False),
}
Report = Callable[[str, int, int | None], None]  # kind of request, done, in all


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


def cut_continuation(context: Sequence[int], continuation: Sequence[int], longest: int) -> list[Query]:
    """Queries for a continuation behind what fits before it: one, or more where it alone is longer than the model reads.

    Each of several scores half of what the model reads, or the rest, and sees the other half.
    """
    whole, first = [*context, *continuation], len(context)
    step = len(continuation) if len(continuation) <= longest else max(longest // 2, 1)
    ends = [*range(first + step, len(whole), step), len(whole)]
    starts = [first, *ends[:-1]]
    return [Query(whole[max(end - longest - 1, 0) : end], end - start) for start, end in zip(starts, ends, strict=True)]


def make_adapter(
    scorer: Scorer,
    tokenizer: Tokenizer,
    engine: Engine | None = None,
    report: Report = lambda kind, done, total: None,
) -> Any:
    """A model of the harness. Likelihoods come from `scorer`; `engine` is needed where text is generated."""
    model, windows = import_harness("lm_eval.api.model"), import_harness("lm_eval.utils")
    longest = scorer.config.seq_len

    class MeshTransformer(model.TemplateLM):
        """Contexts that are too long lose their beginning, as in the harness's own models."""

        batch_size, max_length, tokenizer_name = 1, longest, tokenizer.fingerprint

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
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            queries, owners = [], []
            for number, ((context, continuation), context_ids, ids) in enumerate(requests):
                if not ids:
                    raise ConfigError(f"no tokens in the continuation {continuation!r} behind {context[-30:]!r}")
                cut = cut_continuation(context_ids, ids, longest)
                queries += cut
                owners += [number] * len(cut)
            found = scorer.score(queries, lambda done, total: report("likelihoods", done, total))
            totals = [(0.0, True)] * len(requests)
            for number, likelihood in zip(owners, found, strict=True):
                total, greedy = totals[number]
                totals[number] = total + likelihood.total, greedy and bool(likelihood.greedy.all())
            return totals

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            queries, owners = [], []
            for number, request in enumerate(requests):
                ids = tokenizer.encode(request.args[0])
                for window in windows.get_rolling_token_windows(ids, tokenizer.end_of_text, longest, 1):
                    context, scored = windows.make_disjoint_window(window)
                    queries.append(Query([*context, *scored], len(scored)))
                    owners.append(number)
            found = scorer.score(queries, lambda done, total: report("windows of texts", done, total))
            totals = [0.0] * len(requests)
            for number, likelihood in zip(owners, found, strict=True):
                totals[number] += likelihood.total
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            if engine is None:
                raise ConfigError("generating text needs an engine of its own; while training, leave such tasks out")
            answers = []
            for done, request in enumerate(requests):
                prompt, wishes = request.args
                answers.append(_generate(engine, tokenizer, prompt, wishes))
                report("answers", done + 1, len(requests))
            return answers

        def get_model_info(self) -> dict[str, Any]:
            return {"model": "mesh-transformer", "max_length": longest}

    return MeshTransformer()


def _generate(engine: Engine, tokenizer: Tokenizer, prompt: str, wishes: Mapping[str, Any]) -> str:
    """One answer, up to the first of the strings that end it; greedy unless the task says do_sample."""
    stops = wishes.get("until") or []
    options = SampleConfig(
        temperature=float(wishes.get("temperature", 1.0)) if wishes.get("do_sample") else 0.0,
        top_p=float(wishes.get("top_p", 1.0)) if wishes.get("do_sample") else 1.0,
        max_tokens=int(wishes.get("max_gen_toks", MAX_TOKENS)),
    )
    longest = engine.config.seq_len
    room = min(options.max_tokens, max(longest // 2, 1))
    ids = tokenizer.encode(prompt)
    if len(ids) > longest - room:  # the beginning goes, as in the harness's own models
        prompt = tokenizer.decode(ids[-(longest - room) :])
    options = dataclasses.replace(options, max_tokens=room)
    (completion,) = complete_texts(
        engine, tokenizer, [prompt], options, stops=[stops] if isinstance(stops, str) else list(stops)
    )
    return completion.text


def make_task(name: str, items: Sequence[Mapping[str, Any]]) -> Any:
    """A task of the harness over these items of the row `name`."""
    row = TASKS[name]
    dataset, tasks = import_harness("datasets").Dataset, import_harness("lm_eval.api.task")
    split = dataset.from_list([dict(item) for item in items])
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": split},
        "test_split": "test",
        "output_type": "multiple_choice" if row.kind == "contexts" else row.kind,
        "target_delimiter": row.delimiter,
        "metadata": {"version": row.version},
        "metric_list": [dict(METRICS[metric], metric=metric) for metric in row.metrics],
    }
    match row.kind:
        case "multiple_choice":
            config |= dict(
                doc_to_text=lambda doc: doc["query"],
                doc_to_choice=lambda doc: list(doc["choices"]),
                doc_to_target=lambda doc: doc["gold"],
            )
        case "contexts":
            config |= dict(
                doc_to_text=lambda doc: doc["gold"],
                doc_to_choice=lambda doc: list(doc["choices"]),
                doc_to_target=lambda doc: doc["query"],
            )
        case "loglikelihood":
            config |= dict(
                doc_to_text=lambda doc: doc["query"], doc_to_target=lambda doc: row.delimiter + doc["target"]
            )
            config["target_delimiter"] = ""
        case "generate_until":
            config |= dict(doc_to_text=lambda doc: doc["query"], doc_to_target=lambda doc: doc["target"])
            config["generation_kwargs"] = {"until": ["\n"], "do_sample": False, "max_gen_toks": 64}
    return tasks.ConfigurableTask(config=config)


def run_tasks(adapter: Any, items: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The harness's results of tasks by name, each over its items; one model is asked all of them."""
    evaluator = import_harness("lm_eval.evaluator")
    with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results
        found = evaluator.evaluate(
            adapter,
            {name: make_task(name, of_it) for name, of_it in items.items()},
            log_samples=False,
            bootstrap_iters=1000,
        )
    return {
        key: value for key, value in found.items() if key in ("results", "versions", "n-samples", "higher_is_better")
    }
