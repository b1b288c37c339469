# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a run is made of: one frozen, strictly typed record for each section of its file, with a comment for every field."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.config.evaluation import EvaluateConfig
from mesh_transformer.config.field_types import STRICT, Amount, Fraction, NonNegative, Positive, Rate, Share
from mesh_transformer.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    dir: str = ""  # run folder; empty: runs/<name of the config file>
    init_from: str = ""  # run or checkpoint whose weights a new run begins with (fine-tuning); empty: random weights
    load_optimizer_state: bool = (
        False  # with init_from: its optimizer's moments too; the schedule begins anew either way
    )
    seed: NonNegative = 0  # initialisation, data order and dropout follow from it


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """Sizes of the mesh axes, and which logical axis lies on which of them."""

    data: Annotated[int, Field(ge=-1)] = -1  # replicas; -1: all devices the other axes leave over
    fsdp: Positive = 1  # parameters and optimizer state sharded, batch too
    tensor: Positive = 1  # heads, feed-forward and vocabulary sharded
    expert: Positive = 1  # experts sharded, batch too
    context: Positive = 1  # sequences cut: attention goes round a ring
    pipeline: Positive = (
        1  # layers cut into stages; microbatches (train.grad_accum_steps) follow one another through them
    )
    pipeline_schedule: Literal["1f1b", "gpipe"] = "1f1b"  # gpipe keeps every microbatch's activations until the end
    sequence_parallel: bool = False  # between blocks, activations are cut along the sequence over `tensor` as well
    slices: Positive | None = None  # machines or pods with a slow network between them; None: as the devices say
    cpu_devices: Positive | None = None  # split the CPU into this many devices (to try a mesh on a laptop)
    rules: dict[str, str | list[str]] = Field(default_factory=dict)  # logical axis -> mesh axis or axes; "" replicates
    # a run of several processes, one or more on each host; None and "": what the launcher says, see processes.py
    processes: Positive | Literal["auto"] | None = None  # "auto": jax.distributed finds out (Cloud TPU VMs)
    process_id: NonNegative | None = None  # of this process; 0 prints, and writes metrics and report
    coordinator: str = ""  # host:port of process 0, where all others reach it
    heartbeat_seconds: Rate = 30.0  # a process that is silent for so long is lost: the others stop

    @model_validator(mode="after")
    def check(self) -> "MeshConfig":
        """Zero replicas are no mesh."""
        if self.data == 0:
            raise ValueError("data=0 leaves no devices; use a positive number, or -1 for all that are left")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceConfig:
    """One collection of documents: text files, folders, JSONL(.zst), Parquet, or shards made before."""

    path: str  # file, folder, shard prefix (.bin + .idx), or "python-stdlib"
    weight: Rate = 1.0  # share of the mixture, relative to the other sources
    text_key: str = "text"  # field or column of JSONL and Parquet that holds the text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """From documents to batches."""

    train: dict[str, SourceConfig]
    validation: dict[str, SourceConfig] = Field(default_factory=dict)
    holdout_one_in: NonNegative = (
        0  # one document in this many is held out of each training source, by hash of its name
    )
    tokenizer: str = "bytes"  # "bytes", or a tokenizer.json, or a folder with vocab.json and merges.txt
    shuffle: bool = True
    isolate_documents: bool = False  # no attention across documents packed into one sequence
    # with model.n_encoder_layers, of the text that is hidden from the encoder and written by the decoder (data/span_corruption.py)
    noise_density: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    mean_noise_span_length: Rate = 3.0  # tokens that are hidden in a row
    max_epochs: Rate | None = None  # refuse to run longer than this many passes over the data
    on_bad_document: Literal["error", "skip"] = "error"  # "skip" counts and reports what it leaves out
    cache_dir: str = "~/.cache/mesh-transformer"  # token shards made from the sources

    def measure_spans(self, seq_len: int) -> tuple[int, int, int]:
        """(tokens of text, how many of them are hidden, in how many spans) such that an encoder reads `seq_len` tokens.

        These are what is not hidden, a sentinel for each span, and an end. ValueError where that cannot be.
        """

        def measure(length: int) -> tuple[int, int, int]:
            hidden = min(max(round(length * self.noise_density), 1), length - 1)
            return length, hidden, max(round(hidden / self.mean_noise_span_length), 1)

        length = 2
        while (found := measure(length + 1))[0] - found[1] + found[2] + 1 <= seq_len:
            length += 1
        length, hidden, spans = measure(length)
        if length - hidden + spans + 1 != seq_len or spans > min(hidden, length - hidden):
            raise ValueError(
                f"data.noise_density={self.noise_density} and data.mean_noise_span_length={self.mean_noise_span_length} cannot be had with "
                f"model.seq_len={seq_len}; lower the share, raise the span or the length"
            )
        return length, hidden, spans


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """One optax chain: clip, scale, decay, schedule."""

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    learning_rate: Rate = 6e-4
    end_learning_rate: Amount = 6e-5
    schedule: Literal["cosine", "gptj", "linear", "wsd", "inverse-sqrt", "constant"] = "cosine"
    warmup_steps: NonNegative = 0
    # cosine, gptj and linear: steps after the warm-up; wsd: of the final decay. None: see train/schedule.py
    decay_steps: Positive | None = None
    beta1: Fraction = 0.9  # momentum of sgd and muon as well
    beta2: Fraction = 0.95
    eps: Rate = 1e-8
    weight_decay: Amount = 0.1
    no_decay_axes: tuple[str, ...] = ()  # arrays with one of these logical axes do not decay either
    clip_norm: Amount = 1.0  # global gradient norm; 0: no clipping
    moment_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """The loop."""

    steps: Positive
    batch_size: Positive  # sequences per step, over all devices
    grad_accum_steps: Positive = 1  # microbatches a batch is cut into
    batch_ramp_from: Positive | None = None  # first batch size of a linear ramp, as in GPT-3
    batch_ramp_steps: NonNegative = 0  # steps until batch_size is reached
    z_loss: Amount = 0.0  # weight of (log Z)^2
    loss_chunks: Positive = 1  # a sequence is scored in this many pieces; logits of only one of them exist at a time
    log_every: Positive = 10
    evaluate_every: NonNegative = 0  # steps; 0: only at the end
    evaluate_batches: Positive = 8  # per validation set, during training; all of it at the end
    log_grad_noise_scale: bool = False  # gradient noise scale (McCandlish et al. 2018, appendix A.1)
    log_layer_grad_norms: bool = False  # gradient norm of every layer in the metrics
    loss_spike_factor: Amount = 0.0  # skip a step whose loss or gradient norm exceeds this many running medians; 0: off
    max_consecutive_skips: Positive = 20  # stop after this many skipped steps in a row
    max_minutes: Rate | None = None  # commit a checkpoint and stop after this time

    @model_validator(mode="after")
    def check(self) -> "TrainConfig":
        """Batches are cut evenly and ramps go upwards."""
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulation={self.grad_accum_steps}")
        if (self.batch_ramp_from is None) != (self.batch_ramp_steps == 0):
            raise ValueError("batch_ramp_from and batch_ramp_steps go together: give both or neither")
        if self.batch_ramp_from is not None:
            if self.batch_ramp_from > self.batch_size or self.batch_size % self.batch_ramp_from:
                raise ValueError(f"batch_ramp_from={self.batch_ramp_from} must divide batch_size={self.batch_size}")
            if self.batch_ramp_from % self.grad_accum_steps:
                raise ValueError(
                    f"batch_ramp_from={self.batch_ramp_from} is not a multiple of accumulation={self.grad_accum_steps}"
                )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When state goes to disk, and what stays there."""

    every: Positive = 1000  # steps; the last step is always saved
    keep_last: Positive = 2
    keep_every: Positive | None = None  # steps divisible by this stay for ever
    resume: Literal["latest", "latest-valid"] = "latest"  # damage: refuse, or fall back and say so
    async_save: bool = True  # write while training goes on


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampleConfig:
    """How text is drawn, after training and by default in device_sample.py."""

    prompts: tuple[str, ...] = ()
    max_tokens: Positive = 128
    temperature: Amount = 0.8  # 0: greedy
    top_k: NonNegative = 0  # 0: off
    top_p: Share = 1.0
    min_p: Fraction = 0.0
    repetition_penalty: Rate = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServeConfig:
    """How device_sample.py and device_serve.py hold a trained model, and what the latter grants its clients."""

    weight_dtype: Literal["saved", "bfloat16", "int8"] = (
        "saved"  # int8: a quarter of float32, one scale for each output
    )
    kv_cache_dtype: Literal["model", "float32", "bfloat16", "int8"] = "model"  # keys and values; model: as model.dtype
    slots: Positive = 32  # samples that are decoded at once
    max_queue: NonNegative = 256  # samples that may wait for a slot; requests beyond are answered 429
    max_body_bytes: Positive = 1 << 20  # bytes of a request
    body_timeout_seconds: Rate = 10.0  # time for a request to arrive whole
    request_timeout_seconds: Rate = 600.0  # time for a request to be answered
    warmup_tokens: NonNegative = 240  # before it is ready, compile for prompt and answer of so many tokens; 0: nothing
    drain_seconds: Rate = 7.0  # after SIGTERM: time for what is being answered to end


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackConfig:
    """Where metrics go besides metrics.jsonl and report.html."""

    tensorboard: bool = False
    wandb_project: str | None = None
    sequences: bool = False  # sequences.jsonl too: which sequences each step was given, a line a step


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A whole run."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    data: DataConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)

    @model_validator(mode="after")
    def check(self) -> "Config":
        """Rules across sections."""
        warmup, steps = self.optimizer.warmup_steps, self.train.steps
        if warmup >= steps:
            raise ValueError(f"optimizer.warmup_steps={warmup} must be less than train.steps={steps}")
        end, peak = self.optimizer.end_learning_rate, self.optimizer.learning_rate
        if end > peak:
            raise ValueError(f"optimizer.end_learning_rate={end} exceeds optimizer.learning_rate={peak}")
        if self.run.load_optimizer_state and not self.run.init_from:
            raise ValueError("run.load_optimizer_state needs run.init_from, the checkpoint whose optimizer it is")
        stages, periods = self.mesh.pipeline, self.model.n_layers // len(self.model.pattern)
        if periods % stages:
            raise ValueError(
                f"mesh.pipeline={stages} does not divide model.n_layers={self.model.n_layers} into stages of whole "
                f"attention patterns; use a divisor of {periods}"
            )
        if self.model.experts and "expert" not in self.mesh.rules:
            self.model.experts.check_divides(self.mesh.expert)
        if stages > 1 and self.train.log_grad_noise_scale:
            raise ValueError(
                "train.log_grad_noise_scale looks at each microbatch's own gradient; it needs mesh.pipeline=1"
            )
        self._check_encoder()
        pieces = self.train.loss_chunks * self.mesh.context
        if self.target_len % pieces:
            name = (
                "model.seq_len"
                if self.model.n_encoder_layers is None
                else "what the decoder writes (data.noise_density)"
            )
            raise ValueError(
                f"{name}={self.target_len} is not a multiple of train.loss_chunks x mesh.context = {pieces}"
            )
        if not self.data.train:
            raise ValueError("data.train names no source; add a [data.train.NAME] table with a path")
        both = sorted(set(self.data.train) & set(self.data.validation))
        if both and self.data.holdout_one_in:
            raise ValueError(
                f"data.validation.{both[0]} and the held-out part of data.train.{both[0]} have the same name"
            )
        return self

    def _check_encoder(self) -> None:
        """What goes with an encoder, or with an encoder alone."""
        if not self.model.causal:
            raise ValueError(
                "model.causal=false: next-token training would show a token what it is to predict; give the encoder a decoder "
                "(model.n_encoder_layers), or use it through mesh_transformer.model"
            )
        if self.model.n_encoder_layers is None:
            return
        for name, value in (("context", self.mesh.context), ("pipeline", self.mesh.pipeline)):
            if value > 1:
                raise ValueError(
                    f"model.n_encoder_layers needs mesh.{name}=1: cut along data, fsdp, tensor or expert instead"
                )
        if self.data.isolate_documents:
            raise ValueError("data.isolate_documents has no effect with model.n_encoder_layers; remove it")
        if self.evaluate.tasks:
            raise ValueError("evaluate.tasks are for a decoder alone; remove them, or model.n_encoder_layers")

    @property
    def target_len(self) -> int:
        """Tokens of a sequence that count in the loss, and that a decoder is given."""
        if self.model.n_encoder_layers is None:
            return self.model.seq_len
        _, hidden, spans = self.data.measure_spans(self.model.seq_len)
        return hidden + spans + 1
