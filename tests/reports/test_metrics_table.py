# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The table of logged values: complete rows, and names of version 1.0 that are read under their current ones."""

import json

import jax

from mesh_transformer.config import load_config
from mesh_transformer.reports.console import format_values
from mesh_transformer.reports.html_report import make_page
from mesh_transformer.reports.metrics_log import FILE, read_metrics
from mesh_transformer.reports.metrics_table import (
    BY_NAME,
    NEW_NAMES,
    TRAIN_METRICS,
    VALIDATION_METRICS,
    format_table,
    representative_layers,
)
from mesh_transformer.train.compile import abstract_batch
from mesh_transformer.train.state import describe_state
from mesh_transformer.train.step import make_train_step

OLD_NAMES = {
    "skipped_in_a_row": "consecutive_skips",
    "dropped_share": "dropped_fraction",
    "unused_experts": "idle_experts",
    "largest_expert_load": "max_expert_load",
    "log_z_square": "z_loss_raw",
    "balance_loss": "aux_loss",
}


def test_rows_are_complete_and_distinct():
    assert len(BY_NAME) == len(TRAIN_METRICS)
    assert all(metric.meaning for metric in (*TRAIN_METRICS, *VALIDATION_METRICS))
    assert all(metric.label for metric in TRAIN_METRICS if metric.value_format or metric.headline)
    titles = [metric.plot.title for metric in TRAIN_METRICS if metric.plot]
    assert len(set(titles)) == len(titles)


def test_every_value_is_on_the_console_in_the_report_and_in_the_reference_as_its_row_says():
    values = {metric.name: 1.0 for metric in TRAIN_METRICS if metric.value_format or metric.plot}
    printed = [label for label, _ in format_values({**values, "skipped": 1})]
    assert printed == [metric.label for metric in TRAIN_METRICS if metric.value_format]
    page = make_page("run", [{"step": 1, "kind": "train", "time": 1.0, **values}], "")
    for metric in TRAIN_METRICS:
        assert metric.name in format_table()
        if metric.plot:
            assert f"<b>{metric.plot.title}</b>" in page


def test_names_of_version_1_are_read_under_the_current_ones(tmp_path):
    assert NEW_NAMES == OLD_NAMES
    line = {"step": 3, "kind": "train", **dict.fromkeys(OLD_NAMES), "loss": 2.0, "not_finite": {"log_z_square": "nan"}}
    event = {"step": 3, "kind": "event", "event": "started", "balance_loss": 1.0}
    (tmp_path / FILE).write_text(f"{json.dumps(line)}\n{json.dumps(event)}\n")
    train, read_event = read_metrics(tmp_path / FILE)
    assert train.keys() == {"step", "kind", "loss", "not_finite", *OLD_NAMES.values()}
    assert train["not_finite"] == {"z_loss_raw": "nan"}
    assert read_event == event, "only the values of training steps were renamed"


def test_representative_layers():
    assert representative_layers(1) == [0]
    assert representative_layers(2) == [0, 1]
    assert representative_layers(12) == [0, 4, 8, 11]


def test_every_value_of_the_training_step_has_a_row(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("""
[model]
n_layers = 2
d_model = 16
n_heads = 2
n_vocab = 32
seq_len = 16
experts = {n_experts = 2}
[data.train.x]
path = "x"
[train]
steps = 2
batch_size = 4
grad_accum_steps = 2
log_layer_grad_norms = true
log_grad_noise_scale = true
""")
    config = load_config(path)
    shapes, _ = describe_state(config)
    _, metrics = jax.eval_shape(make_train_step(config), shapes, abstract_batch(config))
    assert set(metrics) <= set(BY_NAME), "add a row to TRAIN_METRICS for each new value"
    derived = {"tokens_per_s", "mfu", "step_ms", "batch_size", "epoch"}  # by train/recorder.py
    assert set(BY_NAME) == set(metrics) | derived
