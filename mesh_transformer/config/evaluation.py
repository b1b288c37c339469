# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Schema of the `[evaluate]` section: tasks, data files, few-shot examples and limits."""

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from mesh_transformer.config.field_types import STRICT, PositiveFraction


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """Evaluation tasks, run during training and by device_evaluate.py; the validation loss is separate."""

    # tasks of evaluate/tasks.py, task files, "text" or "wikitext2"; empty: no evaluation during training
    tasks: tuple[str, ...] = ()
    every: NonNegativeInt = 0  # training steps between evaluations; 0: only at the end
    data: dict[str, str] = Field(default_factory=dict)  # task, or component of "text" -> file or folder
    fewshot_data: dict[str, str] = Field(default_factory=dict)  # task -> file or folder of few-shot examples
    num_fewshot: NonNegativeInt | None = None  # few-shot examples per question; None: as the task defines
    num_fewshot_by_task: dict[str, NonNegativeInt] = Field(
        default_factory=dict
    )  # task -> number, instead of num_fewshot
    text_key: str = "text"  # JSONL field or Parquet column that holds the text
    group_key: str = ""  # JSONL field that divides "text" into components ("meta.pile_set_name" in the Pile)
    limit: PositiveInt | None = None  # maximum documents per component and examples per task; None: all
    # fraction of the documents of "text" to evaluate, selected by a hash of their names (0.1 in the Pile's paper)
    sample_fraction: PositiveFraction = 1.0
    context: PositiveInt | None = None  # tokens of a segment; None: model.seq_len
    stride: PositiveInt | None = None  # new tokens per window; None: `context`, so that segments do not overlap
    batch_tokens: PositiveInt = 8192  # tokens of a batch, including padding
