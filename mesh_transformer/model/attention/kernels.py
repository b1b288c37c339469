# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes attention, chosen by where the program will run and never by where it is compiled.

plain    all scores at once; everywhere, everything
blocked  blocks with an online softmax, a ring where sequences are cut (blocks.py); no T5 bias, no dropout
splash   JAX's Pallas kernel for TPU v4 and later; neither biases nor dropout
triton   JAX's Pallas kernel for GPUs; neither windows, biases nor dropout
cudnn    NVIDIA's, for GPUs in 16 bits; neither segments, biases nor dropout
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import current_layout, target_chip, target_platform
from mesh_transformer.model.attention.dense import dense_attention, dense_attention_in_blocks
from mesh_transformer.model.attention.masks import AttentionContext
from mesh_transformer.model.attention.ring import Ring, ring_attention
from mesh_transformer.model.positions import alibi_slopes

LONG = 1024  # on a CPU all scores at once are faster up to here; beyond, memory counts
BLOCK = 512  # places in a block at most


def choose_kernel(config: ModelConfig, length: int, *, has_segments: bool, cached: bool) -> str:
    """The kernel for sequences of `length`; ConfigError with the remedy where the one asked for cannot do it."""
    if cached:
        return "dense"
    pieces = _ring_size()
    wanted = config.attention_kernel
    if wanted == "auto" and pieces > 1:
        wanted = "blockwise"  # the alternative gathers the sequence, which must be said
    if wanted != "auto":
        if reason := _refuse(wanted, config, length, segmented=has_segments):
            raise ConfigError(f'model.attention_kernel = "{wanted}": {reason}; "dense" can do it')
        return wanted
    match target_platform():
        case "tpu":
            ranking = ("splash", "blockwise", "dense")
        case "gpu":
            ranking = ("cudnn", "triton", "blockwise", "dense")
        case _:
            ranking = ("blockwise", "dense") if length > LONG else ("dense",)
    return next(kernel for kernel in ranking if not _refuse(kernel, config, length, segmented=has_segments))


def _refuse(kernel: str, config: ModelConfig, length: int, *, segmented: bool) -> str | None:
    """Why this kernel cannot compute this attention on the target, or None."""
    if kernel == "dense":
        return None
    platform, pieces = target_platform(), _ring_size()
    local, head_dim = "local" in config.attention_pattern, config.head_dim
    checks = [
        (not config.causal, "it hides from a token what comes after it (model.causal)"),
        (config.dropout > 0, "it has no dropout"),
        (config.positions == "t5", "it has no T5 bias"),
        (kernel != "blockwise" and config.positions == "alibi", "it has no ALiBi bias"),
        (kernel != "blockwise" and pieces > 1, "only blocks go round a ring (mesh.context)"),
        (kernel == "blockwise" and not _is_even(length, pieces), f"{length} places cannot be cut into even blocks"),
        (kernel == "splash" and platform == "gpu", "it is for TPUs"),
        (kernel == "splash" and target_chip() in ("TPU v2", "TPU v3"), "it needs a TPU v4 or later"),
        (kernel == "splash" and length % 128 != 0, f"{length} places are no multiple of 128"),
        (kernel in ("triton", "cudnn") and platform == "tpu", "it is for GPUs"),
        (kernel == "triton" and local, "it has no windows"),
        (kernel == "triton" and length % 128 != 0, f"{length} places are no multiple of 128"),
        (kernel == "triton" and head_dim & (head_dim - 1) != 0, f"d_head={head_dim} is no power of two"),
        (kernel == "triton" and head_dim > 128, f"d_head={head_dim} needs more shared memory than GPUs have"),
        (kernel == "cudnn" and platform == "cpu", "it needs a GPU"),
        (kernel == "cudnn" and segmented, "it cannot isolate documents"),
        (kernel == "cudnn" and config.dtype == "float32", 'it needs model.dtype = "bfloat16"'),
        (kernel == "cudnn" and (head_dim % 8 != 0 or head_dim > 128), f"d_head={head_dim} is not 8, 16, ... 128"),
    ]
    return next((reason for holds, reason in checks if holds), None)


def _is_even(length: int, pieces: int) -> bool:
    cuts = 1 if pieces == 1 else 2 * pieces
    return length % cuts == 0 and _block_length(length // pieces, pieces) >= min(length // cuts, 16)


def _ring_size() -> int:
    layout = current_layout()
    return 1 if layout is None else layout.num_shards("sequence")


def _block_length(length: int, pieces: int) -> int:
    """The longest block of at most BLOCK places that divides a device's part of the sequence (on a ring: each half)."""
    whole = length if pieces == 1 else length // 2
    return next(size for size in range(min(BLOCK, whole), 0, -1) if whole % size == 0)


def dispatch_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    config: ModelConfig,
    local: bool,
    sight: AttentionContext,
) -> Float[Array, "B T H C"]:
    """A layer's attention by `sight.kernel`; T = S for every kernel but the plain one."""
    scale = config.head_dim**-0.5 if config.attention_scale == "rsqrt_d_head" else 1.0
    if sight.masks is not None:
        return _attend_plainly(q, k, v, config, local, sight, scale)
    layout = current_layout()
    slopes = jnp.asarray(alibi_slopes(config.n_heads)) if config.positions == "alibi" else None
    window = config.attention_window if local else None

    def compute(q: Any, k: Any, v: Any, segments: Any, slopes: Any) -> Array:
        k, v = (_own_heads(x, q.shape[2], config) for x in (k, v))
        return KERNELS[sight.kernel](q * scale, k, v, segments, slopes, window)

    if layout is None:
        return compute(q, k, v, sight.segment_ids, slopes)
    # Kernels are opaque to the partitioner, and rings are explicit: every device computes its own rows and heads.
    wide, narrow = (
        layout.spec(("batch", "sequence", heads, "head_dim"), x.shape, f"activation [{heads}]")
        for heads, x in (("heads", q), ("kv_heads", k))
    )
    flat = layout.spec(("batch", "sequence"), q.shape[:2], "activation [segments]")
    return jax.shard_map(
        compute,
        mesh=layout.mesh,
        in_specs=(wide, narrow, narrow, flat, layout.spec(("heads",), (config.n_heads,), "slopes")),
        out_specs=wide,
        check_vma=False,
    )(q, k, v, sight.segment_ids, slopes)


def _attend_plainly(
    q: Any, k: Any, v: Any, config: ModelConfig, local: bool, sight: AttentionContext, scale: float
) -> Float[Array, "B T H C"]:
    assert sight.masks is not None
    masks = sight.masks
    options: dict[str, Any] = dict(scale=scale, dropout_rate=config.dropout)
    visible, length = masks.windowed if local else masks.full, q.shape[1]
    # On a CPU the work saved counts, as long as a block is long; on accelerators one large product is faster.
    n_blocks = next((n for n in (4, 2) if length % n == 0 and length >= 64 * n), 1)
    if config.causal and k.shape[1] == length and n_blocks > 1 and target_platform() == "cpu" and _ring_size() == 1:
        return dense_attention_in_blocks(q, k, v, visible, masks.bias, n_blocks=n_blocks, **options)
    return dense_attention(q, k, v, visible, masks.bias, **options)


def _own_heads(x: Float[Array, "B T K C"], heads: int, config: ModelConfig) -> Float[Array, "B T k C"]:
    """Of key-value heads that every device has, those that its `heads` query heads share (fewer of them than devices)."""
    group = config.n_heads // config.kv_heads
    if x.shape[2] * group == heads:
        return x
    if heads % group and group % heads:
        raise ConfigError(
            f"model.n_kv_heads={config.kv_heads}: {heads} query heads on a device do not share whole key-value heads; "
            'change mesh.tensor, or use model.attention_kernel = "dense"'
        )
    layout = current_layout()
    assert layout is not None
    first = jax.lax.axis_index(tuple(a for a in layout.rules["heads"] if layout.mesh.shape[a] > 1)) * heads // group
    return jax.lax.dynamic_slice_in_dim(x, first, max(heads // group, 1), axis=2)


def _blocked(q: Array, k: Array, v: Array, segments: Any, slopes: Any, window: int | None) -> Array:
    batch, length, heads, channels = q.shape
    kv_heads = k.shape[2]
    size, layout = _ring_size(), current_layout()
    axis = next(a for a in layout.rules["sequence"] if layout.mesh.shape[a] > 1) if layout and size > 1 else None
    ring = Ring(axis, size, _block_length(length, size), window)
    q = q.reshape(batch, length, kv_heads, -1, channels).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    slopes = None if slopes is None else slopes.reshape(kv_heads, -1)
    mixed: Any = ring_attention(q, k, v, segments, slopes, ring)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, channels)


def _splash(q: Array, k: Array, v: Array, segments: Any, slopes: Any, window: int | None) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q.shape[1], q.shape[2]
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), offset=0)
    block = next(size for size in (512, 256, 128) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: Any = {f"block_{name}": block for name in names}
    kernel: Any = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**blocks),
        interpret=target_platform() == "cpu",  # only ever asked for in order to compare
    )
    ids = None if segments is None else splash.SegmentIds(segments, segments)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))(q, k, v, ids).transpose(0, 2, 1, 3)


def _triton(q: Array, k: Array, v: Array, segments: Any, slopes: Any, window: int | None) -> Array:
    from jax.experimental.pallas.ops.gpu import attention

    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    return attention.mha(q, k, v, segments, causal=True, interpret=target_platform() == "cpu")


def _cudnn(q: Array, k: Array, v: Array, segments: Any, slopes: Any, window: int | None) -> Array:
    side = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=1.0, is_causal=True, local_window_size=side, implementation="cudnn"
    )


KERNELS = {"blockwise": _blocked, "splash": _splash, "triton": _triton, "cudnn": _cudnn}
