# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Schema of the `[model]` section: architecture of a decoder-only, encoder-decoder or encoder-only transformer."""

import dataclasses
import json
import math
from typing import Annotated, Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.config.field_types import STRICT, FractionBelowOne, Resume
from mesh_transformer.config.latent_attention import LatentAttentionConfig
from mesh_transformer.config.layers import LayerKind, LayerStack, shortest_pattern, split_into_stacks
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.config.rope import RopeScalingConfig

# Fields that only encoder-only models (causal=false) may set.
ENCODER_ONLY_FIELDS = (
    "shared_layers",
    "n_token_types",
    "d_embedding",
    "position_padding_token",
    "head",
    "pooler",
    "n_labels",
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """A decoder-only, encoder-decoder or encoder-only transformer (published sizes: config/presets.py)."""

    # name in docs/reference/presets.md; other keys override its values
    preset: Annotated[str | None, Resume.FREE] = None
    # -- sizes --
    n_layers: PositiveInt  # layers of the decoder, or of an encoder-only model
    n_encoder_layers: PositiveInt | None = None  # layers of the encoder that the decoder attends to; None: decoder-only
    d_model: PositiveInt  # size of the residual stream
    n_heads: PositiveInt  # query heads
    n_vocab: PositiveInt  # rows of the embedding matrix; at least the tokenizer's vocabulary size
    seq_len: PositiveInt  # context length in tokens; encoder-decoder: of the encoder's input
    n_kv_heads: PositiveInt | None = None  # key-value heads; fewer than n_heads: grouped-query attention; None: n_heads
    d_head: PositiveInt | None = None  # size of each head; None: d_model / n_heads
    d_ff: PositiveInt | None = None  # hidden size of the feed-forward layer; None: 4 d_model
    # -- architecture --
    # "gemma-rmsnorm" stores scale - 1; "gptj-rmsnorm" and "gptj-scalenorm" divide by (norm of the vector + norm_eps), as in
    # mesh-transformer-jax; "nonparametric-layernorm" has no weights (OLMo)
    norm: Literal[
        "layernorm",
        "rmsnorm",
        "gemma-rmsnorm",
        "scalenorm",
        "gptj-rmsnorm",
        "gptj-scalenorm",
        "nonparametric-layernorm",
    ] = "layernorm"
    norm_eps: PositiveFloat = 1e-5  # added to the variance; gptj-rmsnorm, gptj-scalenorm: to the norm of the vector
    # rope-interleaved rotates neighboring channels (GPT-J), rope-half channels i and i + rope_dims / 2 (GPT-NeoX, Llama).
    # falcon-alibi: slope times position of the key, rounded to bfloat16 and scaled like the scores (Falcon RW)
    positions: Literal["none", "learned", "rope-interleaved", "rope-half", "t5", "alibi", "falcon-alibi"] = "learned"
    position_offset: NonNegativeInt = 0  # index of the first position's row in the table of learned positions (OPT: 2)
    # RoBERTa: id of the padding token. Positions count the other tokens; padding uses row position_offset - 1
    position_padding_token: NonNegativeInt | None = None
    t5_buckets: PositiveInt = 32  # rows of the relative position bias (T5)
    t5_max_distance: PositiveInt = 128  # all greater distances share the last bucket (T5)
    # all layers of a stack share the table of the bias (T5); false: each layer has its own (umT5)
    t5_shared_bias: bool = True
    rope_dims: PositiveInt | None = None  # leading channels of a head that are rotated; None: all
    rope_theta: PositiveFloat = 10_000.0  # base of the rotation frequencies
    # base in local layers, where rope_scaling then does not apply (Gemma 3); None: as in global layers
    rope_local_theta: PositiveFloat | None = None
    rope_scaling: RopeScalingConfig | None = None  # frequency scaling for long contexts; None: unscaled
    # pattern repeated over the layers; true: queries and keys are rotated (SmolLM 3: false in every fourth layer)
    rope_pattern: tuple[bool, ...] = (True,)
    # serial: x + attention, then x + ffn (GPT-2). parallel: both read one norm of x (GPT-J). parallel-two-norms: both read
    # their own norm of x (GPT-NeoX). sandwich: serial, with a norm before and after each branch (Gemma 2). reordered-norm:
    # serial, with a norm after each branch only (OLMo 2). post-norm: serial, with a norm after each sum and none after the
    # last layer (Vaswani et al. 2017, BERT)
    residual: Literal["serial", "parallel", "parallel-two-norms", "sandwich", "reordered-norm", "post-norm"] = "serial"
    # activation of the feed-forward layer; clamped-swiglu: SwiGLU with clamped arguments (gpt-oss)
    activation: Literal["gelu-tanh", "gelu-erf", "relu", "silu", "clamped-swiglu"] = "gelu-tanh"
    gated_ffn: bool = False  # activation(x W_gate) * (x W_in), as in SwiGLU
    causal: bool = True  # false: an encoder-only model with bidirectional attention
    shared_layers: bool = False  # all repetitions of the layer pattern have the same parameters (ALBERT)
    # pattern repeated over the layers; local: sliding-window attention. If n_layers is not a multiple of its length, the
    # first layers form a separate scan, and mesh.pipeline must be 1
    attention_pattern: tuple[Literal["global", "local"], ...] = ("global",)
    # keys that a token of a local layer attends to, including itself (bidirectional: on each side)
    attention_window: PositiveInt = 256
    # factor of the attention scores; none: 1 (GPT-Neo, T5); or a number
    attention_scale: Literal["rsqrt_d_head", "none"] | PositiveFloat = "rsqrt_d_head"
    # keys and values are projected from a latent vector (DeepSeek); None: from the residual stream
    latent_attention: LatentAttentionConfig | None = None
    # each head has a learned score in the softmax, like that of a key whose value is zero (gpt-oss)
    attention_sinks: bool = False
    attention_softcap: PositiveFloat | None = None  # scores become cap * tanh(scores / cap) (Gemma 2); None: no cap
    # norm of queries and keys before the rotation. true: RMSNorm of each head, one scale for all heads (Qwen 3);
    # gemma-rmsnorm: the same, storing scale - 1 (Gemma 3); rmsnorm-all-heads: RMSNorm of all heads together (OLMo 2);
    # layernorm-per-head: layer norm of each head with its own scale and no bias (StableLM 2, Command R)
    qk_norm: bool | Literal["gemma-rmsnorm", "rmsnorm-all-heads", "layernorm-per-head"] = False
    # limit of the absolute value of queries, keys and values before the rotation (OLMo, MPT)
    clip_qkv: PositiveFloat | None = None
    qkv_bias: bool = True  # biases of the query, key and value projections
    attention_out_bias: bool = True  # bias of the attention output projection
    ff_bias: bool = True  # biases of the feed-forward layer
    norm_bias: bool = True  # biases of layer norms
    head_bias: bool = False  # bias of the output layer (GPT-J)
    tied_embeddings: bool = True  # the output layer is the transposed embedding matrix
    # factor of the token embeddings (Gemma)
    embedding_scale: Literal["none", "sqrt_d_model"] = "none"
    embedding_norm: bool = False  # norm of the sum of all embeddings (BERT, BLOOM)
    n_token_types: PositiveInt | None = None  # rows of the token type embeddings (BERT); None: no token types
    # size of the embeddings before a projection to d_model (ALBERT); None: d_model
    d_embedding: PositiveInt | None = None
    # size of the token embeddings: one matrix projects them to d_model before positions are added, another the hidden states
    # to it before the head (OPT 350M); None: d_model
    d_token_embedding: PositiveInt | None = None
    # lm: logits from the hidden states; masked-lm: after a linear layer, activation and norm (BERT); none: no logits
    head: Literal["lm", "masked-lm", "none"] = "lm"
    pooler: bool = False  # a linear layer with tanh on the first token's hidden state (BERT)
    n_labels: PositiveInt | None = None  # outputs of a linear layer on the pooled output; None: no classifier
    logit_softcap: PositiveFloat | None = None  # logits become cap * tanh(logits / cap) (Gemma 2); None: no cap
    # factor of the logits; rsqrt_d_model: 1 / sqrt(d_model) (T5 with tied embeddings); or a number (Command R)
    logit_scale: Literal["none", "rsqrt_d_model"] | PositiveFloat = "none"
    init: Literal["gpt2", "gptj", "neox", "t5", "bert"] = "gpt2"  # scheme of the initial weights (model/params.py)
    init_scale: PositiveFloat = 1.0  # factor of the variance of all initial weights (Switch: 0.1)
    experts: ExpertsConfig | None = None  # mixture of experts in some or all layers; None: dense layers only
    dropout: FractionBelowOne = 0.0  # dropout rate of embeddings, attention probabilities and both residual branches
    # -- computation; no effect on the function --
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations, and of weights in matmuls
    # activation checkpointing: the backward pass recomputes nothing (none), everything but the residual stream (full),
    # everything but matmuls with weights (dots), or attention; offload: like full, with the residual stream in host memory
    remat: Annotated[Literal["none", "full", "dots", "attention", "offload"], Resume.FREE] = "none"
    # auto: chosen by platform
    attention_kernel: Annotated[Literal["auto", "dense", "blockwise", "splash", "triton", "cudnn"], Resume.FREE] = (
        "auto"
    )
    # iterations of the layer scan that are unrolled (CPU: n_layers)
    scan_unroll: Annotated[PositiveInt, Resume.FREE] = 1

    @model_validator(mode="after")
    def check(self) -> "ModelConfig":
        """Raise ValueError if fields contradict each other."""
        if self.attention_sinks and self.n_encoder_layers is not None:
            raise ValueError(
                f"attention_sinks=true is not supported with n_encoder_layers={self.n_encoder_layers}; remove attention_sinks"
            )
        if self.latent_attention is not None:
            self._check_latent_attention()
        elif self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; set d_head")
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}; change one of them"
            )
        for name in ("attention_pattern", "rope_pattern"):
            if not getattr(self, name):
                raise ValueError(f"{name}=[] must have at least one element; remove it to use the default")
        if self.activation == "clamped-swiglu" and not self.gated_ffn:
            raise ValueError('activation="clamped-swiglu" requires gated_ffn=true; set it, or use "silu"')
        if self.experts is not None:
            self._check_experts(self.experts)
        if self.n_encoder_layers is not None:
            self._check_encoder(self.n_encoder_layers)
        self._check_positions()
        self._check_encoder_only()
        if self.d_token_embedding is not None and (self.n_encoder_layers is not None or self.head != "lm"):
            raise ValueError(
                f'd_token_embedding={self.d_token_embedding} requires head="lm", not "{self.head}", and no n_encoder_layers; '
                "remove d_token_embedding"
            )
        return self

    def _check_positions(self) -> None:
        rotates = self.positions.startswith("rope")
        for name in ("rope_dims", "rope_scaling", "rope_local_theta"):
            if (value := getattr(self, name)) is not None and not rotates:
                field = (
                    name if dataclasses.is_dataclass(value) else f"{name}={value}"
                )  # without the fields of a section
                raise ValueError(f'{field} has no effect with positions="{self.positions}"; remove it')
        if self.position_offset and self.positions != "learned":
            raise ValueError(
                f'position_offset={self.position_offset} requires positions="learned", not "{self.positions}"; remove it'
            )
        if (self.t5_buckets, self.t5_max_distance) != (32, 128) and self.positions != "t5":
            raise ValueError(
                f"t5_buckets={self.t5_buckets} and t5_max_distance={self.t5_max_distance} have no effect with "
                f'positions="{self.positions}"; remove them, or set positions="t5"'
            )
        if not self.t5_shared_bias and self.positions != "t5":
            raise ValueError(
                f't5_shared_bias=false requires positions="t5", not "{self.positions}"; set it, or remove t5_shared_bias'
            )
        if self.t5_buckets < 4 or self.t5_buckets % 2 or self.t5_max_distance <= self.t5_buckets // 2:
            raise ValueError(
                f"t5_buckets={self.t5_buckets} must be even and at least 4, and t5_max_distance={self.t5_max_distance} must exceed "
                "t5_buckets / 2"
            )
        if not rotates:
            if not all(self.rope_pattern):
                pattern = json.dumps(self.rope_pattern)
                raise ValueError(f'rope_pattern={pattern} has no effect with positions="{self.positions}"; remove it')
            return
        if self.rope_dim > self.head_dim or self.rope_dim % 2:
            raise ValueError(
                f"rope_dims={self.rope_dim} must be even and at most d_head={self.head_dim}; set rope_dims"
            )
        if self.rope_local_theta is not None and "local" not in self.attention_pattern:
            raise ValueError(
                f"rope_local_theta={self.rope_local_theta} has no effect without a local layer in attention_pattern; remove it"
            )
        if self.rope_scaling and self.rope_scaling.short_factor and self.rope_scaling.long_factor:
            n_short, n_long = len(self.rope_scaling.short_factor), len(self.rope_scaling.long_factor)
            if {n_short, n_long} != {self.rope_dim // 2}:
                raise ValueError(
                    f"rope_scaling.short_factor has {n_short} elements and long_factor has {n_long}; each must have "
                    f"{self.rope_dim // 2}, one per pair of rotated channels"
                )

    def _check_experts(self, experts: ExpertsConfig) -> None:
        if experts.dense_layers:
            if self.n_encoder_layers is not None:
                raise ValueError(
                    f"experts.dense_layers={list(experts.dense_layers)} is not supported in an encoder-decoder model; use "
                    "experts.layer_interval, or remove n_encoder_layers"
                )
            if max(experts.dense_layers) >= self.n_layers:
                raise ValueError(
                    f"experts.dense_layers contains {max(experts.dense_layers)}, but with n_layers={self.n_layers} the "
                    f"largest index is {self.n_layers - 1}; remove it"
                )
            if not any(kind.has_experts for kind in self.layer_kinds):
                raise ValueError(
                    f"experts.dense_layers={list(experts.dense_layers)} and experts.layer_interval={experts.layer_interval} leave "
                    "no layer with experts; change one of them, or remove experts"
                )
        elif self.n_layers % self._period:
            raise ValueError(
                f"n_layers={self.n_layers} is not a multiple of {self._period}, the number of layers after which "
                f"attention_pattern, rope_pattern and experts.layer_interval={experts.layer_interval} repeat together; change one "
                "of them"
            )

    def _check_latent_attention(self) -> None:
        required = dict(
            attention_sinks=False,
            n_kv_heads=None,
            d_head=None,
            rope_dims=None,
            qk_norm=False,
            clip_qkv=None,
            rope_pattern=(True,),
        )
        for name, default in required.items():
            if (value := getattr(self, name)) != default:
                raise ValueError(f"{name}={json.dumps(value)} is not supported with latent_attention; remove it")
        if not self.positions.startswith("rope"):
            raise ValueError(
                f'latent_attention requires positions="rope-interleaved" or "rope-half", not "{self.positions}"'
            )
        if self.n_encoder_layers is not None or not self.causal:
            raise ValueError(
                f"latent_attention is only supported in decoder-only models, not with n_encoder_layers={self.n_encoder_layers} "
                f"and causal={json.dumps(self.causal)}; remove n_encoder_layers, and set causal=true"
            )

    def _check_encoder_only(self) -> None:
        """Raise ValueError if fields of encoder-only models contradict other fields."""
        if self.causal:
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name in ENCODER_ONLY_FIELDS:
                if (value := getattr(self, name)) != defaults[name]:
                    raise ValueError(
                        f"{name}={json.dumps(value)} requires causal=false; remove it, or set causal=false"
                    )
        if self.shared_layers and self.experts is not None:
            raise ValueError("shared_layers=true is not supported with experts; remove one of them")
        if self.shared_layers and self.n_layers % self._period:
            raise ValueError(
                f"shared_layers=true requires n_layers to be a multiple of {self._period}, the length of the layer pattern, not "
                f"{self.n_layers}; change n_layers"
            )
        padding = self.position_padding_token
        if padding is not None and (self.positions != "learned" or self.position_offset != padding + 1):
            raise ValueError(
                f'position_padding_token={padding} requires positions="learned" and position_offset={padding + 1}, not '
                f'"{self.positions}" and {self.position_offset}; set them, or remove position_padding_token'
            )
        if self.n_labels is not None and not self.pooler:
            raise ValueError(
                f"n_labels={self.n_labels} requires pooler=true, because the classifier reads the pooled output"
            )
        if self.d_embedding is not None and self.head == "lm":
            raise ValueError(
                f'd_embedding={self.d_embedding} requires head="masked-lm" or "none", not "lm", whose input has d_model='
                f"{self.d_model} channels; change head, or remove d_embedding"
            )
        if self.d_embedding is not None and self.norm.startswith("gptj-"):
            raise ValueError(
                f'd_embedding={self.d_embedding} is not supported with norm="{self.norm}"; use "layernorm"'
            )
        if self.head == "masked-lm" and not self.tied_embeddings:
            raise ValueError('head="masked-lm" requires tied_embeddings=true; set it, or use another head')

    def _check_encoder(self, n_encoder_layers: int) -> None:
        if not self.causal:
            raise ValueError(
                f"n_encoder_layers={n_encoder_layers} requires causal=true, because it adds an encoder to a decoder; for an "
                "encoder-only model, remove n_encoder_layers"
            )
        if self.embedding_norm:
            raise ValueError(
                f"n_encoder_layers={n_encoder_layers} requires embedding_norm=false; remove embedding_norm"
            )
        if self.residual != "serial":
            raise ValueError(f'n_encoder_layers={n_encoder_layers} requires residual="serial", not "{self.residual}"')
        if n_encoder_layers % self._period:
            raise ValueError(
                f"n_encoder_layers={n_encoder_layers} is not a multiple of {self._period}, the number of layers after which "
                "attention_pattern, rope_pattern and experts.layer_interval repeat together; change one of them"
            )

    @property
    def encoder(self) -> "ModelConfig | None":
        """The config of the bidirectional encoder of an encoder-decoder model; None for other models."""
        if self.n_encoder_layers is None:
            return None
        changes: dict[str, Any] = dict(
            n_layers=self.n_encoder_layers, n_encoder_layers=None, causal=False, logit_scale="none"
        )
        return dataclasses.replace(self, **changes)

    def padded_len_limit(self, length: int) -> int:
        """Return the maximum length to which a sequence of `length` tokens can be padded without changing its output.

        It is seq_len, except for rotary embeddings whose frequencies depend on the sequence length (longrope).
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.type != "longrope" or scaling.original_seq_len is None:
            return self.seq_len
        return self.seq_len if length > scaling.original_seq_len else min(scaling.original_seq_len, self.seq_len)

    def max_new_tokens(self, length: int) -> int:
        """Return the number of tokens that can be generated after a prompt of `length` tokens.

        In a decoder-only model, prompt and generated tokens share `seq_len`. In an encoder-decoder model the encoder reads the
        prompt, and the decoder generates up to `seq_len` tokens.
        """
        return self.seq_len - (length if self.n_encoder_layers is None else 0)

    @property
    def _period(self) -> int:
        """Number of layers after which attention_pattern, rope_pattern and experts.layer_interval repeat together."""
        interval = 1 if self.experts is None else self.experts.layer_interval
        return math.lcm(len(self.attention_pattern), len(self.rope_pattern), interval)

    @property
    def pattern(self) -> tuple[LayerKind, ...]:
        """The layer kinds of one period of the last layer stack; most models have only one stack."""
        return self.layer_stacks[-1].pattern

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return tuple(self._kind_of_layer(i) for i in range(self.n_layers))

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        """The layer scans: "layers", preceded by "first_layers" if the layers are not a whole number of periods."""
        if self.n_layers % self._period or (self.experts is not None and self.experts.dense_layers):
            return split_into_stacks(self.layer_kinds)
        pattern = tuple(self._kind_of_layer(i) for i in range(self._period))
        return (LayerStack("layers", 0, pattern, self.n_layers // self._period),)

    def _kind_of_layer(self, i: int) -> LayerKind:
        e = self.experts
        local = self.attention_pattern[i % len(self.attention_pattern)] == "local"
        has_experts = e is not None and (i + 1) % e.layer_interval == 0 and i not in e.dense_layers
        return LayerKind(local, has_experts, self.rope_pattern[i % len(self.rope_pattern)])

    @property
    def layer_uses(self) -> int:
        """Number of layers that use the same parameters: 1, or the repetitions of the pattern with shared_layers."""
        return self.layer_stacks[0].n_repeats if self.shared_layers else 1

    @property
    def embedding_dim(self) -> int:
        """Size of the embeddings: `d_embedding`, or its default."""
        return self.d_embedding or self.d_model

    @property
    def token_embedding_dim(self) -> int:
        """Size of the token embeddings and of what the head reads: `d_token_embedding`, or `embedding_dim`."""
        return self.d_token_embedding or self.embedding_dim

    @property
    def head_dim(self) -> int:
        """Size of one head's queries and keys: `d_head`, or its default."""
        if self.latent_attention is not None:
            return self.latent_attention.d_unrotated + self.latent_attention.d_rotated
        return self.d_head or self.d_model // self.n_heads

    @property
    def value_dim(self) -> int:
        """Size of one head's values."""
        return self.head_dim if self.latent_attention is None else self.latent_attention.d_value

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads: `n_kv_heads`, or its default."""
        return self.n_kv_heads or self.n_heads

    @property
    def ff_dim(self) -> int:
        """Hidden size of the feed-forward layer: `d_ff`, or its default."""
        return self.d_ff or 4 * self.d_model

    @property
    def expert_ff_dim(self) -> int:
        """Hidden size of each expert: `experts.d_ff`, or its default."""
        return (self.experts and self.experts.d_ff) or self.ff_dim

    @property
    def shared_ff_dim(self) -> int:
        """Hidden size of the shared expert: `experts.shared_d_ff`, or its default."""
        return (self.experts and self.experts.shared_d_ff) or self.ff_dim

    @property
    def rope_dim(self) -> int:
        """Number of leading channels of a head that are rotated: `rope_dims`, or its default."""
        if self.latent_attention is not None:
            return self.latent_attention.d_rotated
        return self.rope_dims or self.head_dim

    def effective_fields(self) -> dict[str, Any]:
        """Return the fields that affect the output at inference, with defaults filled in; fields without effect are None.

        Two configs with equal effective fields compute the same function of weights and inputs.
        """
        excluded = ("preset", "init", "init_scale", "dropout", "dtype", "remat", "attention_kernel", "scan_unroll")
        table = {key: value for key, value in dataclasses.asdict(self).items() if key not in excluded}
        table["experts"] = self.experts and self._effective_expert_fields(self.experts)
        table |= dict(d_head=self.head_dim, n_kv_heads=self.kv_heads, d_ff=self.ff_dim)
        scales = {"rsqrt_d_head": self.head_dim**-0.5, "rsqrt_d_model": self.d_model**-0.5, "none": 1.0}
        for key in ("attention_scale", "logit_scale"):
            table[key] = scales.get(str(table[key]), table[key])
        for key in ("attention_pattern", "rope_pattern"):
            table[key] = shortest_pattern([table[key][i % len(table[key])] for i in range(self.n_layers)])
        table["rope_scaling"] = self.rope_scaling and self.rope_scaling.effective_fields()
        rotates = self.positions.startswith("rope")
        table |= dict(rope_dims=self.rope_dim if rotates else None)
        if self.positions != "t5":
            table |= dict(t5_buckets=None, t5_max_distance=None, t5_shared_bias=None)
        unused = dict(
            d_ff=all(kind.has_experts for kind in self.layer_kinds),
            rope_theta=not rotates, attention_window="local" not in self.attention_pattern,
            norm_bias=self.norm in ("rmsnorm", "gemma-rmsnorm", "scalenorm", "nonparametric-layernorm"),
            tied_embeddings=self.head == "none",
            head_bias=self.head == "none", logit_softcap=self.head == "none", logit_scale=self.head == "none",
        )  # fmt: skip
        return table | {key: None for key, is_unused in unused.items() if is_unused}

    def _effective_expert_fields(self, experts: ExpertsConfig) -> dict[str, Any]:
        shared = self.shared_ff_dim if experts.shared_expert else None
        dense = [i for i, kind in enumerate(self.layer_kinds) if not kind.has_experts]
        resolved = dict(d_ff=self.expert_ff_dim, shared_d_ff=shared, dense_layers=dense, layer_interval=None)
        return experts.effective_fields() | resolved
