# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a run is made of: one frozen, strictly typed record for each section of its file, with a comment for every field."""

import dataclasses
import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.evaluate.choices import EvaluateConfig
from mesh_transformer.field_types import STRICT, Amount, Four, Fraction, NonNegative, Positive, Rate, Share
from mesh_transformer.model.expert_choices import ExpertsConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    dir: str = ""  # run folder; empty: runs/<name of the config file>
    start_from: str = ""  # run or checkpoint whose weights a new run begins with (fine-tuning); empty: random weights
    keep_optimizer: bool = False  # with start_from: its optimizer's moments too; the schedule begins anew either way
    seed: NonNegative = 0  # initialisation, data order and dropout follow from it


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """One decoder-only transformer, as a point in a grid of closed choices (sizes: `model/families.py`)."""

    preset: str | None = None  # a row of families.py; every other key here overrides it
    # sizes
    n_layers: Positive
    d_model: Positive
    n_heads: Positive
    n_vocab: Positive
    seq_len: Positive
    n_kv_heads: Positive | None = None  # fewer than n_heads: grouped-query attention; None: n_heads
    d_head: Positive | None = None  # None: d_model / n_heads
    d_ff: Positive | None = None  # None: 4 d_model
    # choices
    # those of "gptj-" divide by a vector's length + norm_eps, as mesh-transformer-jax's of these names
    norm: Literal["layernorm", "rmsnorm", "scalenorm", "gptj-rmsnorm", "gptj-scalenorm"] = "layernorm"
    norm_eps: Rate = 1e-5
    positions: Literal["none", "learned", "rotary-pairs", "rotary-halves", "t5", "alibi"] = "learned"
    rotary_dims: Positive | None = None  # leading channels of a head that rotate; None: all
    rotary_base: Rate = 10_000.0
    # Llama 3.1: slow rotations are divided by the first number; then low and high frequency factor, and trained length
    rotary_scaling: Four | None = None
    residual: Literal["serial", "parallel", "parallel-two-norms"] = "serial"
    activation: Literal["gelu-tanh", "gelu-erf", "relu", "silu"] = "gelu-tanh"
    gated: bool = False  # activation(x W_gate) * (x W_in), as in SwiGLU
    attention_pattern: tuple[Literal["global", "local"], ...] = ("global",)  # repeated over the layers
    attention_window: Positive = 256  # a local layer sees this many keys, itself included
    attention_scale: Literal["sqrt", "none"] = "sqrt"  # divide scores by sqrt(d_head), or not (GPT-Neo)
    qk_norm: bool = False  # rmsnorm of every head's queries and keys before they rotate, as in Qwen 3
    qkv_bias: bool = True
    attention_out_bias: bool = True
    ff_bias: bool = True
    norm_bias: bool = True
    head_bias: bool = False
    tied_embeddings: bool = True
    init: Literal["gpt2", "gptj", "neox"] = "gpt2"
    init_scale: Rate = 1.0  # variance of all weights at the start, as a multiple of init's (Switch: 0.1)
    experts: ExpertsConfig | None = None  # a router and experts in some layers; None: every feed-forward layer is dense
    dropout: Fraction = 0.0  # on embeddings, attention probabilities and both residual branches
    # how it is computed; the function does not depend on it
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and of weights in products
    # What the backward pass recomputes: nothing; all but the residual stream; all but products with weights; the insides
    # of attention; as "full", with the stream kept in the host's memory
    remat: Literal["none", "full", "dots", "attention", "offload"] = "none"
    attention_kernel: Literal["auto", "plain", "blocked", "splash", "triton", "cudnn"] = "auto"  # auto: by platform
    unroll: Positive = 1  # periods of the layer scan laid out in one piece (CPU likes all of them)

    @model_validator(mode="after")
    def check(self) -> "ModelConfig":
        """Cross-field rules; raises ValueError with the remedy."""
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; set d_head to say so on purpose"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if not self.attention_pattern or self.n_layers % len(self.attention_pattern):
            length = len(self.attention_pattern)
            raise ValueError(f"n_layers={self.n_layers} is not a multiple of the attention_pattern's length {length}")
        if self.experts is not None and self.n_layers % (n := len(self.pattern)):
            raise ValueError(f"n_layers={self.n_layers} is not a multiple of {n}: experts.every={self.experts.every}")
        rotates = self.positions.startswith("rotary")
        for name in ("rotary_dims", "rotary_scaling"):
            if (value := getattr(self, name)) is not None and not rotates:
                raise ValueError(f'{name}={value} has no effect with positions="{self.positions}"; remove it')
        if self.rotary_scaling is not None and self.rotary_scaling[1] >= self.rotary_scaling[2]:
            raise ValueError(f"rotary_scaling={self.rotary_scaling}: the second number must be below the third")
        if rotates and (self.rotary_channels > self.head_dim or self.rotary_channels % 2):
            raise ValueError(f"rotary_dims={self.rotary_channels} must be even and at most d_head={self.head_dim}")
        return self

    @property
    def pattern(self) -> tuple[tuple[bool, bool], ...]:
        """The layers of one period, which repeats: whether each attends locally, and whether it has experts."""
        attention, every = self.attention_pattern, 1 if self.experts is None else self.experts.every
        places = range(math.lcm(len(attention), every))
        has_experts = [self.experts is not None and (i + 1) % every == 0 for i in places]
        return tuple((attention[i % len(attention)] == "local", has_experts[i]) for i in places)

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def ff_dim(self) -> int:
        """Width of the feed-forward layer."""
        return self.d_ff or 4 * self.d_model

    @property
    def rotary_channels(self) -> int:
        """Leading channels of a head that rotate."""
        return self.rotary_dims or self.head_dim

    def describe_function(self) -> dict[str, Any]:
        """What determines the function computed, with every default spelled out; equal for equal functions of the weights."""
        free = ("preset", "init", "init_scale", "dropout", "dtype", "remat", "attention_kernel", "unroll")
        table = {key: value for key, value in dataclasses.asdict(self).items() if key not in free}
        table["experts"] = self.experts and self.experts.describe_function()
        table |= dict(d_head=self.head_dim, n_kv_heads=self.kv_heads, d_ff=self.ff_dim)
        rotates = self.positions.startswith("rotary")
        table |= dict(rotary_dims=self.rotary_channels if rotates else None)
        unused = dict(
            rotary_base=not rotates, attention_window="local" not in self.attention_pattern,
            norm_bias=self.norm in ("rmsnorm", "scalenorm"),
        )  # fmt: skip
        return table | {key: None for key, is_unused in unused.items() if is_unused}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """Sizes of the mesh axes, and which logical axis lies on which of them."""

    data: Annotated[int, Field(ge=-1)] = -1  # replicas; -1: all devices the other axes leave over
    fsdp: Positive = 1  # parameters and optimizer state sharded, batch too
    tensor: Positive = 1  # heads, feed-forward and vocabulary sharded
    expert: Positive = 1  # experts sharded, batch too
    context: Positive = 1  # sequences cut: attention goes round a ring
    pipeline: Positive = 1  # layers cut into stages; microbatches (train.accumulation) follow one another through them
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
    holdout: NonNegative = 0  # one document in this many is held out of each training source, by hash of its name
    tokenizer: str = "bytes"  # "bytes", or a tokenizer.json, or a folder with vocab.json and merges.txt
    shuffle: bool = True
    isolate_documents: bool = False  # no attention across documents packed into one sequence
    max_epochs: Rate | None = None  # refuse to run longer than this many passes over the data
    on_bad_document: Literal["error", "skip"] = "error"  # "skip" counts and reports what it leaves out
    cache_dir: str = "~/.cache/mesh-transformer"  # token shards made from the sources


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
    accumulation: Positive = 1  # microbatches a batch is cut into
    ramp_from: Positive | None = None  # first batch size of a linear ramp, as in GPT-3
    ramp_steps: NonNegative = 0  # steps until batch_size is reached
    z_loss: Amount = 0.0  # weight of (log Z)^2
    loss_pieces: Positive = 1  # a sequence is scored in this many pieces; logits of only one of them exist at a time
    log_every: Positive = 10
    evaluate_every: NonNegative = 0  # steps; 0: only at the end
    evaluate_batches: Positive = 8  # per validation set, during training; all of it at the end
    noise_scale: bool = False  # gradient noise scale (McCandlish et al. 2018, appendix A.1)
    layer_norms: bool = False  # gradient norm of every layer in the metrics
    spike_factor: Amount = 0.0  # skip a step whose loss or gradient norm exceeds this many running medians; 0: off
    max_skipped: Positive = 20  # stop after this many skipped steps in a row
    max_minutes: Rate | None = None  # commit a checkpoint and stop after this time

    @model_validator(mode="after")
    def check(self) -> "TrainConfig":
        """Batches are cut evenly and ramps go upwards."""
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}")
        if (self.ramp_from is None) != (self.ramp_steps == 0):
            raise ValueError("ramp_from and ramp_steps go together: give both or neither")
        if self.ramp_from is not None:
            if self.ramp_from > self.batch_size or self.batch_size % self.ramp_from:
                raise ValueError(f"ramp_from={self.ramp_from} must divide batch_size={self.batch_size}")
            if self.ramp_from % self.accumulation:
                raise ValueError(f"ramp_from={self.ramp_from} is not a multiple of accumulation={self.accumulation}")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When state goes to disk, and what stays there."""

    every: Positive = 1000  # steps; the last step is always saved
    keep_last: Positive = 2
    keep_every: Positive | None = None  # steps divisible by this stay for ever
    resume: Literal["newest", "newest-intact"] = "newest"  # damage: refuse, or fall back and say so
    asynchronous: bool = True  # write while training goes on


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

    weights: Literal["saved", "bfloat16", "int8"] = "saved"  # int8: a quarter of float32, one scale for each output
    cache: Literal["model", "float32", "bfloat16", "int8"] = "model"  # keys and values; model: as model.dtype
    slots: Positive = 32  # samples that are decoded at once
    queue: NonNegative = 256  # samples that may wait for a slot; requests beyond are answered 429
    max_body: Positive = 1 << 20  # bytes of a request
    body_seconds: Rate = 10.0  # time for a request to arrive whole
    timeout_seconds: Rate = 600.0  # time for a request to be answered
    warm_up: NonNegative = 240  # before it is ready, compile for prompt and answer of so many tokens; 0: nothing
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
        if self.run.keep_optimizer and not self.run.start_from:
            raise ValueError("run.keep_optimizer needs run.start_from, the checkpoint whose optimizer it is")
        stages, periods = self.mesh.pipeline, self.model.n_layers // len(self.model.pattern)
        if periods % stages:
            raise ValueError(
                f"mesh.pipeline={stages} does not divide model.n_layers={self.model.n_layers} into stages of whole "
                f"attention patterns; use a divisor of {periods}"
            )
        if self.model.experts and "expert" not in self.mesh.rules:
            self.model.experts.check_pieces(self.mesh.expert)
        if stages > 1 and self.train.noise_scale:
            raise ValueError("train.noise_scale looks at each microbatch's own gradient; it needs mesh.pipeline=1")
        pieces = self.train.loss_pieces * self.mesh.context
        if self.model.seq_len % pieces:
            raise ValueError(
                f"model.seq_len={self.model.seq_len} is not a multiple of train.loss_pieces x mesh.context = {pieces}"
            )
        if not self.data.train:
            raise ValueError("data.train names no source; add a [data.train.NAME] table with a path")
        both = sorted(set(self.data.train) & set(self.data.validation))
        if both and self.data.holdout:
            raise ValueError(
                f"data.validation.{both[0]} and the held-out part of data.train.{both[0]} have the same name"
            )
        return self
