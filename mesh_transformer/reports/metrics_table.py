# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Table of logged values, which the console, the HTML report and the reader of metrics.jsonl use.

To log a new value, return it from the training step (train/step.py) or compute it in train/recorder.py, and add a row
here. MFU (model FLOPs utilization) is the model's FLOP/s divided by the measured peak matmul FLOP/s.

`python -m mesh_transformer.reports.metrics_table` prints the table.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

SPEED = "Throughput"
OPTIMIZATION = "Optimization"
EXPERTS = "Experts"


class Plot(NamedTuple):
    """Description of the plot of a value in the HTML report."""

    title: str
    group: str  # heading under which the report shows the plot
    subtitle: str
    line: str  # name of the line in the legend
    log: bool = False  # logarithmic y axis
    smoothed: bool = True


class Metric(NamedTuple):
    """One logged value."""

    name: str  # key in metrics.jsonl
    unit: str
    meaning: str
    label: str = ""  # display name; required if there is a `value_format`
    value_format: str = ""  # display format; the console prints the metrics that have a format
    plot: Plot | None = None
    optional: bool = False  # not logged by every run; a metric without values has no plot, and a zero has no tile
    headline: bool = False  # the report shows its last value in a tile at the top
    old_name: str = ""  # name of the value in files of version 1.0


def _experts(title: str, subtitle: str, line: str) -> Plot:
    return Plot(title, EXPERTS, f"{subtitle}, by step", line)


TRAIN_METRICS = (
    Metric("loss", "nats per token", "training loss of the step", "loss", "{:.4f}", headline=True),
    Metric(
        "learning_rate", "", "learning rate of the step", "learning rate", "{:.2e}",
        Plot("Learning rate", OPTIMIZATION, "by step", "learning rate", smoothed=False),
    ),
    Metric(
        "grad_norm", "", "L2 norm of the gradient before clipping", "grad norm", "{:.2f}",
        Plot("Gradient norm", OPTIMIZATION, "before clipping, by step", "norm", log=True),
    ),
    Metric(
        "tokens_per_s", "tokens/s", "training throughput over all devices", "tokens/s", "{:,.0f}",
        Plot("Throughput", SPEED, "tokens per second, by step", "tokens/s"), headline=True,
    ),
    Metric(
        "mfu", "fraction", "model FLOP/s over the measured peak matmul FLOP/s of all devices", "MFU", "{:.0%}",
        Plot("MFU", SPEED, "fraction of the measured peak matmul FLOP/s, by step", "MFU"), headline=True,
    ),
    Metric(
        "noise_scale", "sequences", "gradient noise scale (train.log_grad_noise_scale)", "noise scale", "{:.3g}",
        Plot("Gradient noise scale", OPTIMIZATION, "sequences, by step", "noise scale", log=True), optional=True,
    ),
    Metric("skipped", "steps", "steps skipped since the start of the run", "skipped", "{:,}", optional=True, headline=True),
    Metric(
        "consecutive_skips", "steps", "consecutive skipped steps up to this step; checked by the run, not written",
        old_name="skipped_in_a_row",
    ),
    Metric("step_ms", "milliseconds", "mean time of a step since the last line"),
    Metric("batch_size", "sequences", "batch size of the step"),
    Metric("epoch", "epochs", "passes over the training data so far"),
    Metric("z_loss_raw", "nats^2", "mean squared log of the softmax normalizer, unweighted", old_name="log_z_square"),
    Metric("layer_grad_norms", "", "gradient norm of each layer (train.log_layer_grad_norms)", optional=True),
    Metric(
        "dropped_fraction", "fraction", "expert assignments dropped because the expert was at capacity",
        plot=_experts("Dropped tokens", "fraction of assignments over capacity", "dropped"),
        optional=True, old_name="dropped_share",
    ),
    Metric(
        "max_expert_load", "multiples of an even load", "largest load of an expert in any layer",
        plot=_experts("Maximum expert load", "multiples of an even load, any layer", "load"),
        optional=True, old_name="largest_expert_load",
    ),
    Metric(
        "idle_experts", "experts", "experts of all layers that received no token",
        plot=_experts("Idle experts", "experts without a token, all layers", "experts"),
        optional=True, old_name="unused_experts",
    ),
    Metric(
        "router_entropy", "nats", "entropy of the router's distribution, mean over layers; at most log(n_experts)",
        plot=_experts("Router entropy", "nats, at most log(n_experts)", "entropy"), optional=True,
    ),
    Metric(
        "aux_loss", "", "load-balancing loss, mean over layers, unweighted; 1 for an even load",
        plot=_experts("Load-balancing loss", "1 for an even load, mean over layers", "loss"),
        optional=True, old_name="balance_loss",
    ),
    Metric(
        "router_z_loss", "nats^2", "z loss of the routers, mean over layers, unweighted",
        plot=_experts("Router z loss", "mean over layers", "loss"), optional=True,
    ),
    Metric(
        "expert_load", "multiples of an even load",
        "load of each expert, one list for each of `representative_layers`", optional=True,
    ),
)  # fmt: skip
VALIDATION_METRICS = (
    Metric("bits_per_byte", "bits/byte", "loss per UTF-8 byte of text, comparable between tokenizers", "this model", "{:.3f}"),
    Metric("xz_bits_per_byte", "bits/byte", "size of the same text compressed by xz -9", "xz -9", "{:.3f}"),
    Metric("gzip_bits_per_byte", "bits/byte", "size of the same text compressed by gzip -9", "gzip -9", "{:.3f}"),
    Metric("loss", "nats per token", "mean loss on the validation set", "loss", "{:.4f}"),
    Metric("perplexity", "", "exp(loss)", "perplexity", "{:.3f}"),
)  # fmt: skip
BY_NAME = {metric.name: metric for metric in TRAIN_METRICS}
CONSOLE_METRICS = tuple(metric for metric in TRAIN_METRICS if metric.value_format)
NEW_NAMES = {metric.old_name: metric.name for metric in TRAIN_METRICS if metric.old_name}


def representative_layers(n_layers: int) -> list[int]:
    """Return the indices of the layers whose values are logged: up to four, evenly spaced from first to last."""
    return sorted({0, n_layers // 3, 2 * n_layers // 3, n_layers - 1})


def translate_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values`, whose names may be of any version, with their current names."""
    return {NEW_NAMES.get(name, name): value for name, value in values.items()}


def format_table() -> str:
    """Return the names, units and meanings of all logged values as text."""
    lines = []
    for kind, metrics in (("train", TRAIN_METRICS), ("evaluation", VALIDATION_METRICS)):
        lines += [f'lines of kind "{kind}"', *(_format_row(metric) for metric in metrics), ""]
    return "\n".join(lines)


def _format_row(metric: Metric) -> str:
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"  {metric.name:<20}{metric.meaning}{unit}"


if __name__ == "__main__":
    print(format_table())
