# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The [evaluate] section of a run: what is measured, on what, and how much of it."""

from pydantic import Field
from pydantic.dataclasses import dataclass

from mesh_transformer.config.field_types import STRICT, NonNegative, Positive, Share


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """Measurements beside the loss on validation sets: in training at given steps, and of device_evaluate.py."""

    tasks: tuple[str, ...] = ()  # names of evaluate/tasks.py or files, "text", "wikitext2"; none: nothing in training
    every: NonNegative = 0  # steps of training; 0: only at the end
    data: dict[str, str] = Field(default_factory=dict)  # a task's name, or a component of "text" -> file or folder
    fewshot_data: dict[str, str] = Field(
        default_factory=dict
    )  # a task's name -> file or folder that shots are drawn from
    num_fewshot: NonNegative | None = (
        None  # examples before every question of a task; None: as many as its definition says
    )
    num_fewshot_by_task: dict[str, NonNegative] = Field(
        default_factory=dict
    )  # a task's name -> its own number of shots
    text_key: str = "text"  # field or column of JSONL and Parquet that holds the text
    group_key: str = ""  # field of JSONL by which "text" is divided into components ("meta.pile_set_name" in the Pile)
    limit: Positive | None = None  # documents of each component, items of each task; None: all
    sample_fraction: Share = (
        1.0  # of the documents of "text", picked by a hash of their names (0.1 in the Pile's paper)
    )
    context: Positive | None = None  # tokens of a segment; None: model.seq_len
    stride: Positive | None = None  # new tokens of a window; None: as many as context, so that segments do not overlap
    batch_tokens: Positive = 8192  # of a batch, padding included
