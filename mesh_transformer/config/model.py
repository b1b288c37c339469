# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The `[model]` section of a run: one transformer, decoder, encoder or both, as a point in a grid of closed choices."""

import dataclasses
import math
from typing import Any, Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.config.field_types import STRICT, Four, Fraction, Positive, Rate
from mesh_transformer.config.moe import ExpertsConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """One transformer: a decoder, a decoder that reads an encoder, or an encoder alone (sizes: `config/presets.py`)."""

    preset: str | None = None  # a row of families.py; every other key here overrides it
    # sizes
    n_layers: Positive
    n_encoder_layers: Positive | None = (
        None  # of an encoder, which all n_layers of the decoder attend to; None: there is none
    )
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
    positions: Literal["none", "learned", "rope-interleaved", "rope-half", "t5", "alibi"] = "learned"
    rope_dims: Positive | None = None  # leading channels of a head that rotate; None: all
    rope_theta: Rate = 10_000.0
    # Llama 3.1: slow rotations are divided by the first number; then low and high frequency factor, and trained length
    rope_scaling: Four | None = None
    residual: Literal["serial", "parallel", "parallel-two-norms"] = "serial"
    activation: Literal["gelu-tanh", "gelu-erf", "relu", "silu"] = "gelu-tanh"
    gated_ffn: bool = False  # activation(x W_gate) * (x W_in), as in SwiGLU
    causal: bool = True  # a token sees itself and those before it; false: an encoder alone, where it sees all of them
    attention_pattern: tuple[Literal["global", "local"], ...] = ("global",)  # repeated over the layers
    attention_window: Positive = 256  # a local layer sees this many keys, itself included (not causal: on either side)
    attention_scale: Literal["rsqrt_d_head", "none"] = "rsqrt_d_head"  # divide scores by sqrt(d_head), or not (GPT-Neo)
    qk_norm: bool = False  # rmsnorm of every head's queries and keys before they rotate, as in Qwen 3
    qkv_bias: bool = True
    attention_out_bias: bool = True
    ff_bias: bool = True
    norm_bias: bool = True
    head_bias: bool = False
    tied_embeddings: bool = True
    logit_scale: Literal["none", "rsqrt_d_model"] = (
        "none"  # divide what the head scores by sqrt(d_model), as T5 does where it is tied
    )
    init: Literal["gpt2", "gptj", "neox", "t5"] = "gpt2"
    init_scale: Rate = 1.0  # variance of all weights at the start, as a multiple of init's (Switch: 0.1)
    experts: ExpertsConfig | None = None  # a router and experts in some layers; None: every feed-forward layer is dense
    dropout: Fraction = 0.0  # on embeddings, attention probabilities and both residual branches
    # how it is computed; the function does not depend on it
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and of weights in products
    # What the backward pass recomputes: nothing; all but the residual stream; all but products with weights; the insides
    # of attention; as "full", with the stream kept in the host's memory
    remat: Literal["none", "full", "dots", "attention", "offload"] = "none"
    attention_kernel: Literal["auto", "dense", "blockwise", "splash", "triton", "cudnn"] = "auto"  # auto: by platform
    scan_unroll: Positive = 1  # periods of the layer scan laid out in one piece (CPU likes all of them)

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
            raise ValueError(
                f"n_layers={self.n_layers} is not a multiple of {n}: experts.layer_interval={self.experts.layer_interval}"
            )
        if self.n_encoder_layers is not None:
            self._check_encoder(self.n_encoder_layers)
        rotates = self.positions.startswith("rope")
        for name in ("rope_dims", "rope_scaling"):
            if (value := getattr(self, name)) is not None and not rotates:
                raise ValueError(f'{name}={value} has no effect with positions="{self.positions}"; remove it')
        if self.rope_scaling is not None and self.rope_scaling[1] >= self.rope_scaling[2]:
            raise ValueError(f"rope_scaling={self.rope_scaling}: the second number must be below the third")
        if rotates and (self.rope_dim > self.head_dim or self.rope_dim % 2):
            raise ValueError(f"rope_dims={self.rope_dim} must be even and at most d_head={self.head_dim}")
        return self

    def _check_encoder(self, layers: int) -> None:
        if not self.causal:
            raise ValueError(
                f"n_encoder_layers={layers} needs causal=true, for the decoder writes from left to right; an encoder alone has "
                "n_layers and no n_encoder_layers"
            )
        if self.residual != "serial":
            raise ValueError(f'n_encoder_layers={layers} needs residual="serial", not "{self.residual}"')
        if layers % (n := len(self.pattern)):
            raise ValueError(
                f"n_encoder_layers={layers} is not a multiple of {n}: attention_pattern, experts.layer_interval"
            )

    @property
    def encoder(self) -> "ModelConfig | None":
        """The same choices for the encoder, which sees all of its sequence; None where there is none."""
        if self.n_encoder_layers is None:
            return None
        own: dict[str, Any] = dict(
            n_layers=self.n_encoder_layers, n_encoder_layers=None, causal=False, logit_scale="none"
        )
        return dataclasses.replace(self, **own)

    def max_new_tokens(self, length: int) -> int:
        """Tokens that can be written behind a prompt of so many; an encoder reads it, and leaves the decoder all of its own."""
        return self.seq_len - (length if self.n_encoder_layers is None else 0)

    @property
    def pattern(self) -> tuple[tuple[bool, bool], ...]:
        """The layers of one period, which repeats: whether each attends locally, and whether it has experts."""
        attention, every = self.attention_pattern, 1 if self.experts is None else self.experts.layer_interval
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
    def rope_dim(self) -> int:
        """Leading channels of a head that rotate."""
        return self.rope_dims or self.head_dim

    def describe_function(self) -> dict[str, Any]:
        """What determines the function computed, with every default spelled out; equal for equal functions of the weights."""
        free = ("preset", "init", "init_scale", "dropout", "dtype", "remat", "attention_kernel", "unroll")
        table = {key: value for key, value in dataclasses.asdict(self).items() if key not in free}
        table["experts"] = self.experts and self.experts.describe_function()
        table |= dict(d_head=self.head_dim, n_kv_heads=self.kv_heads, d_ff=self.ff_dim)
        rotates = self.positions.startswith("rope")
        table |= dict(rope_dims=self.rope_dim if rotates else None)
        unused = dict(
            rope_theta=not rotates, attention_window="local" not in self.attention_pattern,
            norm_bias=self.norm in ("rmsnorm", "scalenorm"),
        )  # fmt: skip
        return table | {key: None for key, is_unused in unused.items() if is_unused}
