# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Schema of a run's TOML file: one frozen, strictly typed dataclass per section, with a comment for every field.

`Resume` markers are the rules for fields that change when a run is resumed (field_types.py). docs/reference/config.md is
generated from this file.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.config.evaluation import EvaluateConfig
from mesh_transformer.config.field_types import STRICT, FractionBelowOne, PositiveFraction, Resume
from mesh_transformer.config.model import ModelConfig

CACHE_DIR = "~/.cache/mesh-transformer"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """The run folder, initial weights and random seed."""

    dir: Annotated[str, Resume.FREE] = ""  # run folder; empty: runs/<name of the config file>
    # run or checkpoint whose weights initialize a new run (fine-tuning); empty: random initialization
    init_from: Annotated[str, Resume.FREE] = ""
    # with init_from: load its optimizer state too; the learning rate schedule restarts in either case
    load_optimizer_state: Annotated[bool, Resume.FREE] = False
    seed: NonNegativeInt = 0  # determines initialization, data order and dropout


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """Mesh axis sizes, rules that map logical axes to mesh axes, and the processes of a distributed run."""

    data: Annotated[int, Field(ge=-1)] = -1  # data parallelism (replicas); -1: all devices left by the other axes
    fsdp: PositiveInt = 1  # fully sharded data parallelism: parameters, optimizer state and batch are sharded
    tensor: PositiveInt = 1  # tensor parallelism: heads, feed-forward units and vocabulary are sharded
    expert: PositiveInt = 1  # expert parallelism: experts and batch are sharded
    context: PositiveInt = 1  # context parallelism: sequences are sharded, with ring attention
    # pipeline parallelism: layers are split into stages, through which microbatches (train.grad_accum_steps) pass
    pipeline: PositiveInt = 1
    pipeline_schedule: Literal["1f1b", "gpipe"] = "1f1b"  # gpipe stores the activations of all microbatches
    sequence_parallel: bool = False  # between blocks, activations are also sharded along the sequence over `tensor`
    # number of TPU slices or hosts, between which the network is slow; None: the number that JAX reports
    slices: PositiveInt | None = None
    cpu_devices: PositiveInt | None = None  # use this many virtual CPU devices, to try a mesh on a laptop
    # logical axis -> mesh axis or axes; "" replicates. Logical axes and default rules: mesh_transformer/mesh.py
    rules: dict[str, str | list[str]] = Field(default_factory=dict)
    # number of processes; "auto": detected by jax.distributed (Cloud TPU VMs); None: from the launcher's environment
    # (distributed/bootstrap.py)
    processes: PositiveInt | Literal["auto"] | None = None
    # index of this process; process 0 prints, logs metrics and writes the report; None: from the environment
    process_id: NonNegativeInt | None = None
    coordinator: str = ""  # host:port of process 0, reachable from all other processes; "": from the environment
    # without a heartbeat for this long, a process is considered lost and the others stop
    heartbeat_seconds: PositiveFloat = 30.0

    @model_validator(mode="after")
    def check(self) -> "MeshConfig":
        """Raise ValueError for data=0."""
        if self.data == 0:
            raise ValueError(
                "data=0 is not a valid number of replicas; use a positive number, or -1 for all remaining devices"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceConfig:
    """One dataset: text files, folders, JSONL(.zst), Parquet, or existing token shards."""

    path: str  # file, folder, shard prefix (.bin + .idx), or "python-stdlib"
    weight: PositiveFloat = 1.0  # relative weight in the data mixture
    text_key: str = "text"  # JSONL field or Parquet column that holds the text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Datasets, tokenizer, packing and the validation split."""

    train: dict[str, SourceConfig]  # name -> dataset
    # name -> validation dataset, besides the held-out documents
    validation: Annotated[dict[str, SourceConfig], Resume.FREE] = Field(default_factory=dict)
    # hold out one document in N of each training dataset, by hash of its name; 0: none
    holdout_one_in: NonNegativeInt = 0
    tokenizer: str = "bytes"  # "bytes", a tokenizer.json, or a folder with vocab.json and merges.txt
    shuffle: bool = True  # shuffle the sequences in every epoch; documents are packed into sequences in order
    isolate_documents: bool = False  # no attention between documents that are packed into one sequence
    # Span corruption (T5), with model.n_encoder_layers; see data/span_corruption.py
    noise_density: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15  # fraction of tokens that are replaced by sentinels
    mean_noise_span_length: PositiveFloat = 3.0  # mean number of tokens in a replaced span
    # more epochs over the data than this are an error; None: no limit
    max_epochs: Annotated[PositiveFloat | None, Resume.FREE] = None
    on_bad_document: Literal["error", "skip"] = "error"  # "skip" counts and reports damaged documents
    # folder of the token shards built from the datasets
    cache_dir: Annotated[str, Resume.FREE] = CACHE_DIR

    def measure_spans(self, seq_len: int) -> tuple[int, int, int]:
        """Return (text tokens, noise tokens, noise spans) for which the encoder input has exactly `seq_len` tokens.

        The encoder input holds the unmasked tokens, one sentinel per span and an end token. Raises ValueError if no
        text length gives `seq_len`.
        """

        def measure(length: int) -> tuple[int, int, int]:
            noise = min(max(round(length * self.noise_density), 1), length - 1)
            return length, noise, max(round(noise / self.mean_noise_span_length), 1)

        length = 2
        while (counts := measure(length + 1))[0] - counts[1] + counts[2] + 1 <= seq_len:
            length += 1
        length, noise, spans = measure(length)
        if length - noise + spans + 1 != seq_len or spans > min(noise, length - noise):
            raise ValueError(
                f"data.noise_density={self.noise_density} and data.mean_noise_span_length={self.mean_noise_span_length} "
                f"do not give an encoder input of exactly model.seq_len={seq_len} tokens; lower the density, or raise "
                "the span length or seq_len"
            )
        return length, noise, spans


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """The optax chain: clipping, scaling, weight decay and learning rate schedule."""

    # optimizer (train/optimizer.py)
    name: Annotated[Literal["adamw", "adafactor", "lion", "muon", "sgd"], Resume.FIXED] = "adamw"
    learning_rate: PositiveFloat = 6e-4  # peak learning rate, after the warm-up
    end_learning_rate: NonNegativeFloat = 6e-5  # learning rate at the end of the schedule
    # shape of the learning rate after the warm-up; formulas: train/schedule.py
    schedule: Literal["cosine", "gptj", "linear", "wsd", "inverse-sqrt", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0  # steps of linear warm-up from 0
    # cosine, gptj and linear: steps after the warm-up; wsd: steps of the final decay. None: see train/schedule.py
    decay_steps: PositiveInt | None = None
    beta1: FractionBelowOne = 0.9  # also the momentum of sgd and muon
    beta2: FractionBelowOne = 0.95  # decay of the second moment
    eps: PositiveFloat = 1e-8  # added to the denominator of the update
    weight_decay: NonNegativeFloat = 0.1  # decoupled, times the learning rate; not for norms, biases and no_decay_axes
    no_decay_axes: tuple[str, ...] = ()  # no weight decay for arrays with one of these logical axes
    clip_norm: NonNegativeFloat = 1.0  # maximum global gradient norm; 0: no clipping
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # storage type of the moments


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """Steps, batches, loss, logging and validation of the training loop."""

    steps: PositiveInt  # total number of training steps
    batch_size: Annotated[PositiveInt, Resume.FIXED]  # sequences per step, on all devices together
    grad_accum_steps: PositiveInt = 1  # microbatches per batch
    # first batch size of a linear ramp (Brown et al. 2020, section 2.3)
    batch_ramp_from: Annotated[PositiveInt | None, Resume.FIXED] = None
    batch_ramp_steps: Annotated[NonNegativeInt, Resume.FIXED] = 0  # steps until batch_size is reached
    z_loss: NonNegativeFloat = 0.0  # weight of (log Z)^2 in the loss
    # number of chunks of a sequence whose logits and loss are computed one after the other, to save memory
    loss_chunks: PositiveInt = 1
    log_every: PositiveInt = 10  # steps between logged metrics
    evaluate_every: NonNegativeInt = 0  # steps between validations; 0: only at the end
    evaluate_batches: PositiveInt = 8  # batches of each validation set during training; the final validation uses all
    # log the gradient noise scale (McCandlish et al. 2018, appendix A.1)
    log_grad_noise_scale: Annotated[bool, Resume.FIXED] = False
    log_layer_grad_norms: bool = False  # log the gradient norm of each layer
    # skip a step whose loss or grad norm exceeds this multiple of its running median; 0: never
    loss_spike_factor: NonNegativeFloat = 0.0
    max_consecutive_skips: PositiveInt = 20  # stop after this many skipped steps in a row
    max_minutes: PositiveFloat | None = None  # save a checkpoint and stop after this time

    @model_validator(mode="after")
    def check(self) -> "TrainConfig":
        """Raise ValueError if microbatches have unequal sizes or the batch ramp does not fit `batch_size`."""
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of grad_accum_steps={self.grad_accum_steps}; change one of "
                "them"
            )
        if self.batch_ramp_from is None and self.batch_ramp_steps > 0:
            raise ValueError(
                f"batch_ramp_steps={self.batch_ramp_steps} requires batch_ramp_from; set it, or remove batch_ramp_steps"
            )
        if self.batch_ramp_from is not None and self.batch_ramp_steps == 0:
            raise ValueError(
                f"batch_ramp_from={self.batch_ramp_from} requires batch_ramp_steps of at least 1, not 0; set it, or remove "
                "batch_ramp_from"
            )
        if self.batch_ramp_from is not None:
            if self.batch_ramp_from > self.batch_size or self.batch_size % self.batch_ramp_from:
                raise ValueError(f"batch_ramp_from={self.batch_ramp_from} must divide batch_size={self.batch_size}")
            if self.batch_ramp_from % self.grad_accum_steps:
                raise ValueError(
                    f"batch_ramp_from={self.batch_ramp_from} is not a multiple of grad_accum_steps={self.grad_accum_steps}; "
                    "change one of them"
                )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """Checkpoint intervals and retention."""

    every: PositiveInt = 1000  # steps between checkpoints; the last step is always saved
    keep_last: PositiveInt = 2  # number of latest checkpoints to keep
    keep_every: PositiveInt | None = None  # checkpoints whose step is divisible by this are never deleted
    # if the latest checkpoint is damaged, latest: error; latest-valid: resume from the latest valid one
    resume: Literal["latest", "latest-valid"] = "latest"
    async_save: bool = True  # write in the background while training continues


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampleConfig:
    """Sampling parameters of samples during and after training, and defaults of device_sample.py and the server."""

    # prompts of the samples that are generated during and after training
    prompts: tuple[str, ...] = ()
    max_tokens: PositiveInt = 128  # tokens to generate per sample
    temperature: NonNegativeFloat = 0.8  # 0: greedy
    top_k: NonNegativeInt = 0  # 0: off
    top_p: PositiveFraction = 1.0  # nucleus sampling (Holtzman et al. 2019); 1: off
    min_p: FractionBelowOne = 0.0  # minimum probability relative to the most probable token; 0: off
    repetition_penalty: PositiveFloat = 1.0  # divides the logits of tokens that occurred (Keskar et al. 2019); 1: off
    presence_penalty: float = 0.0  # subtracted from the logit of each token that was generated; 0: off
    frequency_penalty: float = 0.0  # subtracted per occurrence in the generated tokens; 0: off
    # add to prompts the special tokens that the tokenizer of a converted model adds, such as <s>
    add_special_tokens: bool = True
    parse_special: bool = False  # encode special tokens written in a prompt as their ids; otherwise as text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServeConfig:
    """Inference engine of device_sample.py and device_serve.py, and limits of the server."""

    # saved: as in the checkpoint; int8: one scale per output channel
    weight_dtype: Literal["saved", "bfloat16", "int8"] = "saved"
    kv_cache_dtype: Literal["model", "float32", "bfloat16", "int8"] = "model"  # model: model.dtype
    slots: PositiveInt = 32  # maximum sequences decoded at the same time
    # speculative decoding of decoder-only models: verify several draft tokens in one forward pass, without changing the
    # output. prompt-lookup: draft tokens are those that followed earlier occurrences of the last tokens; draft-model: a
    # smaller model generates them
    speculative: Literal["none", "prompt-lookup", "draft-model"] = "none"
    # with speculative="draft-model": run or checkpoint of a smaller model with the same vocabulary
    draft_model: str = ""
    num_speculative_tokens: PositiveInt = 4  # draft tokens per forward pass
    max_queue: NonNegativeInt = 256  # sequences that may wait for a slot; further requests get status 429
    max_body_bytes: PositiveInt = 1 << 20  # maximum size of a request's body
    body_timeout_seconds: PositiveFloat = 10.0  # maximum time for a request's body to arrive
    request_timeout_seconds: PositiveFloat = 600.0  # maximum time to answer a request
    # before reporting ready, compile the programs for requests of up to this many tokens; 0: none
    warmup_tokens: NonNegativeInt = 240
    drain_seconds: PositiveFloat = 7.0  # maximum time for running requests to finish after SIGTERM

    @model_validator(mode="after")
    def check(self) -> "ServeConfig":
        """Raise ValueError if only one of speculative="draft-model" and draft_model is set."""
        if self.speculative == "draft-model" and not self.draft_model:
            raise ValueError(
                'speculative="draft-model" requires draft_model; set it to the run or checkpoint of a smaller model'
            )
        if self.draft_model and self.speculative != "draft-model":
            raise ValueError(
                f'draft_model="{self.draft_model}" has no effect with speculative="{self.speculative}"; '
                'set speculative="draft-model", or remove draft_model'
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackConfig:
    """Outputs for metrics in addition to metrics.jsonl and report.html."""

    tensorboard: bool = False  # write TensorBoard events into the run folder
    # Weights & Biases project; unset: not used
    wandb_project: str | None = None
    sequences: bool = False  # also write sequences.jsonl: the sequences of each step, one line per step


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """The configuration of a training run."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig
    mesh: Annotated[MeshConfig, Resume.FREE] = Field(default_factory=MeshConfig)
    data: DataConfig
    optimizer: Annotated[OptimizerConfig, Resume.LOGGED] = Field(default_factory=OptimizerConfig)
    train: Annotated[TrainConfig, Resume.LOGGED]
    checkpoint: Annotated[CheckpointConfig, Resume.LOGGED] = Field(default_factory=CheckpointConfig)
    sample: Annotated[SampleConfig, Resume.FREE] = Field(default_factory=SampleConfig)
    serve: Annotated[ServeConfig, Resume.FREE] = Field(default_factory=ServeConfig)
    evaluate: Annotated[EvaluateConfig, Resume.FREE] = Field(default_factory=EvaluateConfig)
    track: Annotated[TrackConfig, Resume.FREE] = Field(default_factory=TrackConfig)

    @model_validator(mode="after")
    def check(self) -> "Config":
        """Raise ValueError if fields of different sections contradict each other."""
        warmup, steps = self.optimizer.warmup_steps, self.train.steps
        if warmup >= steps:
            raise ValueError(f"optimizer.warmup_steps={warmup} must be less than train.steps={steps}")
        end, peak = self.optimizer.end_learning_rate, self.optimizer.learning_rate
        if end > peak:
            raise ValueError(
                f"optimizer.end_learning_rate={end} exceeds optimizer.learning_rate={peak}; lower end_learning_rate"
            )
        if self.run.load_optimizer_state and not self.run.init_from:
            raise ValueError(
                "run.load_optimizer_state=true requires run.init_from; set it to the checkpoint to load the state from"
            )
        stages = self.mesh.pipeline
        periods = self.model.layer_stacks[-1].n_repeats
        if stages > 1 and len(self.model.layer_stacks) > 1:
            raise ValueError(
                f"mesh.pipeline={stages} requires one repeated layer pattern, but model.n_layers={self.model.n_layers} is not a "
                "multiple of the pattern's length, or model.experts.dense_layers breaks the pattern; set mesh.pipeline=1"
            )
        if periods % stages:
            raise ValueError(
                f"mesh.pipeline={stages} does not divide the {periods} repetitions of the layer pattern "
                f"(model.n_layers={self.model.n_layers}, pattern length {len(self.model.pattern)}); use a divisor of {periods}"
            )
        if self.model.experts and "expert" not in self.mesh.rules:
            self.model.experts.check_divides(self.mesh.expert)
        if stages > 1 and self.train.log_grad_noise_scale:
            raise ValueError(
                f"train.log_grad_noise_scale=true needs the gradient of each microbatch, which mesh.pipeline={stages} does not "
                "compute; set mesh.pipeline=1, or train.log_grad_noise_scale=false"
            )
        self._check_encoder()
        chunks = self.train.loss_chunks * self.mesh.context
        if self.target_len % chunks:
            name, fields = f"model.seq_len = {self.target_len}", ""
            if self.model.n_encoder_layers is not None:
                name = f"the number of target tokens, {self.target_len}"
                fields = ", which follows from model.seq_len, data.noise_density and data.mean_noise_span_length,"
            raise ValueError(
                f"{name}{fields} is not a multiple of train.loss_chunks x mesh.context = {self.train.loss_chunks} x "
                f"{self.mesh.context}; change one of these fields"
            )
        if not self.data.train:
            raise ValueError("data.train is empty; add a [data.train.NAME] table with a path")
        both = sorted(set(self.data.train) & set(self.data.validation))
        if both and self.data.holdout_one_in:
            raise ValueError(
                f"data.validation.{both[0]} has the same name as the held-out part of data.train.{both[0]}; rename one of them, "
                "or set data.holdout_one_in=0"
            )
        return self

    def _check_encoder(self) -> None:
        """Raise ValueError for fields that encoder-only or encoder-decoder models do not support."""
        if self.model.shared_layers and self.mesh.pipeline > 1:
            raise ValueError(
                f"mesh.pipeline={self.mesh.pipeline} is not supported with model.shared_layers, because all stages would need "
                "the same layer; set it to 1 and shard over data, fsdp or tensor"
            )
        if self.model.n_encoder_layers is None:
            return
        for name, value in (("context", self.mesh.context), ("pipeline", self.mesh.pipeline)):
            if value > 1:
                raise ValueError(
                    f"mesh.{name}={value} is not supported with model.n_encoder_layers; set it to 1 and shard over data, "
                    "fsdp, tensor or expert"
                )
        if self.data.isolate_documents:
            raise ValueError("data.isolate_documents=true has no effect with model.n_encoder_layers; remove it")
        if self.evaluate.tasks:
            raise ValueError(
                f"evaluate.tasks={list(self.evaluate.tasks)} is only supported for decoder-only models, but "
                "model.n_encoder_layers is set; remove evaluate.tasks"
            )
        if self.serve.speculative != "none":
            raise ValueError(
                f'serve.speculative="{self.serve.speculative}" is only supported for decoder-only models, but '
                'model.n_encoder_layers is set; set serve.speculative="none"'
            )

    @property
    def target_len(self) -> int:
        """Number of target tokens per sequence, which is the length of the decoder's input."""
        if self.model.n_encoder_layers is None:
            return self.model.seq_len
        _, noise, spans = self.data.measure_spans(self.model.seq_len)
        return noise + spans + 1
