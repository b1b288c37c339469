# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Attention kernels and their selection for the target platform, which may differ from the platform of this machine.

dense      all scores at once; every platform and every configuration
blockwise  blocks with an online softmax, ring attention if the sequence is sharded (ring.py); no bias except ALiBi, no dropout
splash     JAX's Pallas kernel for TPU v4 and later; no biases, no dropout
triton     JAX's Pallas kernel for GPUs; no windows, no biases, no dropout
cudnn      NVIDIA's kernel for GPUs, in 16 bits; no segment IDs, no biases, no dropout
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import current_layout, target_chip, target_platform
from mesh_transformer.model.attention.dense import count_blocks, dense_attention, dense_attention_in_blocks
from mesh_transformer.model.attention.masks import AttentionContext, Masks
from mesh_transformer.model.attention.ring import Ring, ring_attention
from mesh_transformer.model.formulas import attention_scale
from mesh_transformer.model.positions import alibi_slopes

# Tokens. On a CPU, the dense kernel is faster up to this length; longer sequences use a kernel that needs less memory.
LONG_SEQUENCE = 1024
MAX_BLOCK = 512  # positions per block


class HeadBiases(NamedTuple):
    """Parameters of the scores with one number per head."""

    slopes: Float[Array, "H"] | None  # slopes of the ALiBi bias
    sinks: Float[Array, "H"] | None  # scores of an additional key whose value is zero


class KernelOptions(NamedTuple):
    """Static arguments of a kernel."""

    config: ModelConfig
    # Number of keys that a query attends to, including the key at the query's position; None: all earlier keys.
    window: int | None


def choose_kernel(config: ModelConfig, length: int, *, has_segments: bool, cached: bool) -> str:
    """Return the kernel for sequences of `length` tokens.

    Raises ConfigError if the kernel named by model.attention_kernel does not support them.
    """
    if cached:
        return "dense"
    n_shards = _ring_size()
    requested = config.attention_kernel
    if requested == "auto" and n_shards > 1:
        requested = "blockwise"  # "dense" would gather the sequence, so it is used only if it is requested explicitly
    if requested != "auto":
        if reason := _why_unsupported(requested, config, length, has_segments=has_segments):
            raise ConfigError(f'model.attention_kernel = "{requested}" {reason}; use "dense"')
        return requested
    match target_platform():
        case "tpu":
            ranking = ("splash", "blockwise", "dense")
        case "gpu":
            ranking = ("cudnn", "triton", "blockwise", "dense")
        case _:
            ranking = ("blockwise", "dense") if length > LONG_SEQUENCE else ("dense",)
    return next(kernel for kernel in ranking if not _why_unsupported(kernel, config, length, has_segments=has_segments))


def _why_unsupported(kernel: str, config: ModelConfig, length: int, *, has_segments: bool) -> str | None:
    """Return the reason why the kernel cannot compute this attention on the target platform, or None."""
    if kernel == "dense":
        return None
    platform = target_platform()
    n_shards = _ring_size()
    local = "local" in config.attention_pattern
    head_dim = config.head_dim
    checks = [
        (not config.causal, "supports causal attention only, and model.causal is false"),
        (config.dropout > 0, f"does not support dropout (model.dropout={config.dropout})"),
        (config.positions == "t5", "does not support the T5 bias (model.positions)"),
        (config.positions == "falcon-alibi", "does not support Falcon's ALiBi bias (model.positions)"),
        (kernel != "blockwise" and config.positions == "alibi", "does not support the ALiBi bias (model.positions)"),
        (kernel != "blockwise" and config.attention_sinks, "does not support model.attention_sinks"),
        (
            kernel not in ("blockwise", "splash") and config.attention_softcap is not None,
            "does not cap scores (model.attention_softcap)",
        ),
        (kernel != "blockwise" and n_shards > 1, "does not support ring attention (mesh.context)"),
        (kernel == "blockwise" and not _has_even_blocks(length, n_shards), f"cannot divide {length} positions evenly"),
        (kernel == "splash" and platform == "gpu", "runs on TPUs only"),
        (kernel == "splash" and target_chip() in ("TPU v2", "TPU v3"), f"needs TPU v4 or later, not {target_chip()}"),
        (kernel == "splash" and length % 128 != 0, f"needs a sequence length divisible by 128, not {length}"),
        (kernel in ("triton", "cudnn") and platform == "tpu", "runs on GPUs only"),
        (kernel == "triton" and local, "does not support attention windows (model.attention_pattern)"),
        (kernel == "triton" and length % 128 != 0, f"needs a sequence length divisible by 128, not {length}"),
        (kernel == "triton" and head_dim & (head_dim - 1) != 0, f"needs a power of two as d_head, not {head_dim}"),
        (kernel == "triton" and head_dim > 128, f"needs d_head <= 128 (shared memory of a GPU), not {head_dim}"),
        (kernel == "cudnn" and platform == "cpu", "runs on GPUs only"),
        (kernel == "cudnn" and has_segments, "does not support isolated documents (data.isolate_documents)"),
        (kernel == "cudnn" and config.dtype == "float32", 'needs model.dtype = "bfloat16"'),
        (kernel == "cudnn" and (head_dim % 8 != 0 or head_dim > 128), f"needs d_head = 8, 16, ... 128, not {head_dim}"),
    ]
    return next((reason for applies, reason in checks if applies), None)


def _has_even_blocks(length: int, n_shards: int) -> bool:
    n_chunks = 1 if n_shards == 1 else 2 * n_shards
    return length % n_chunks == 0 and _block_length(length // n_shards, n_shards) >= min(length // n_chunks, 16)


def _ring_size() -> int:
    layout = current_layout()
    return 1 if layout is None else layout.num_shards("sequence")


def _block_length(length: int, n_shards: int) -> int:
    """Return the largest block length, at most MAX_BLOCK, that divides a device's shard, or each half of it on a ring."""
    chunk = length if n_shards == 1 else length // 2
    return next(size for size in range(min(MAX_BLOCK, chunk), 0, -1) if chunk % size == 0)


def dispatch_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K V"],
    config: ModelConfig,
    local: bool,
    context: AttentionContext,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H V"]:
    """Return one layer's attention output, computed by `context.kernel`. T = S except for the dense kernel."""
    if context.masks is not None:
        return _attend_dense((q, k, v, sinks), config, local, context.masks)
    value_dim = v.shape[-1]
    if value_dim < k.shape[-1]:  # the kernels require keys and values of equal size: pad with zeros
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - value_dim)))
    scale = attention_scale(config)
    layout = current_layout()
    slopes = jnp.asarray(alibi_slopes(config.n_heads)) if config.positions == "alibi" else None
    per_head = HeadBiases(slopes, sinks)
    window = config.attention_window if local else None

    def compute(q: Any, k: Any, v: Any, segment_ids: Any, per_head: HeadBiases) -> Array:
        k = _local_kv_heads(k, q.shape[2], config)
        v = _local_kv_heads(v, q.shape[2], config)
        return KERNELS[context.kernel](q * scale, k, v, segment_ids, per_head, KernelOptions(config, window))

    if layout is None:
        return compute(q, k, v, context.segment_ids, per_head)[..., :value_dim]
    # XLA cannot partition a kernel, and ring attention has explicit collectives: under shard_map, every device computes the
    # sequences and heads of its shard.
    q_spec = layout.spec(("batch", "sequence", "heads", "head_dim"), q.shape, "activation [heads]")
    kv_spec = layout.spec(("batch", "sequence", "kv_heads", "head_dim"), k.shape, "activation [kv_heads]")
    ids_spec = layout.spec(("batch", "sequence"), q.shape[:2], "activation [segments]")
    return jax.shard_map(
        compute,
        mesh=layout.mesh,
        in_specs=(q_spec, kv_spec, kv_spec, ids_spec, layout.spec(("heads",), (config.n_heads,), "slopes and sinks")),
        out_specs=q_spec,
        check_vma=False,
    )(q, k, v, context.segment_ids, per_head)[..., :value_dim]


def _attend_dense(inputs: Any, config: ModelConfig, local: bool, masks: Masks) -> Float[Array, "B T H V"]:
    q, k, v, sinks = inputs
    mask = masks.windowed if local else masks.full
    length = q.shape[1]
    # Blocks are faster on a CPU; on accelerators one large matmul is faster.
    in_blocks = config.causal and k.shape[1] == length and count_blocks(length) > 1
    if in_blocks and target_platform() == "cpu" and _ring_size() == 1:
        return dense_attention_in_blocks(q, k, v, mask, masks.bias, config, sinks)
    return dense_attention(q, k, v, mask, masks.bias, config, sinks)


def _local_kv_heads(x: Float[Array, "B T K C"], n_local_heads: int, config: ModelConfig) -> Float[Array, "B T k C"]:
    """Return the key-value heads that this device's query heads use: a slice of `x` if the heads are replicated, else `x`."""
    group = config.n_heads // config.kv_heads
    if x.shape[2] * group == n_local_heads:
        return x
    if n_local_heads % group and group % n_local_heads:
        raise ConfigError(
            f"model.n_kv_heads={config.kv_heads}: the {n_local_heads} query heads of a device do not share a whole number "
            'of key-value heads; change mesh.tensor, or use model.attention_kernel = "dense"'
        )
    layout = current_layout()
    assert layout is not None
    mesh_axes = tuple(a for a in layout.rules["heads"] if layout.mesh.shape[a] > 1)
    first = jax.lax.axis_index(mesh_axes) * n_local_heads // group
    return jax.lax.dynamic_slice_in_dim(x, first, max(n_local_heads // group, 1), axis=2)


def _blockwise(q: Array, k: Array, v: Array, segment_ids: Any, per_head: Any, options: KernelOptions) -> Array:
    batch, length, heads, channels = q.shape
    kv_heads = k.shape[2]
    n_shards = _ring_size()
    layout = current_layout()
    axis = next(a for a in layout.rules["sequence"] if layout.mesh.shape[a] > 1) if layout and n_shards > 1 else None
    ring = Ring(axis, n_shards, _block_length(length, n_shards), options.window, options.config)
    q = q.reshape(batch, length, kv_heads, -1, channels).transpose(0, 2, 3, 1, 4)
    k = k.transpose(0, 2, 1, 3)
    v = v.transpose(0, 2, 1, 3)
    slopes, sinks = (None if x is None else x.reshape(kv_heads, -1) for x in per_head)
    out: Any = ring_attention(q, k, v, segment_ids, slopes, sinks, ring)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, channels)


def _splash(q: Array, k: Array, v: Array, segment_ids: Any, per_head: Any, options: KernelOptions) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q.shape[1], q.shape[2]
    shape = (length, length)
    mask = (
        masks.CausalMask(shape) if options.window is None else masks.LocalMask(shape, (options.window - 1, 0), offset=0)
    )
    block = next(size for size in (512, 256, 128) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: Any = {f"block_{name}": block for name in names}
    kernel: Any = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**blocks),
        attn_logits_soft_cap=options.config.attention_softcap,
        interpret=target_platform() == "cpu",  # used in tests only
    )
    ids = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))(q, k, v, ids).transpose(0, 2, 1, 3)


def _triton(q: Array, k: Array, v: Array, segment_ids: Any, per_head: Any, options: KernelOptions) -> Array:
    from jax.experimental.pallas.ops.gpu import attention

    group = q.shape[2] // k.shape[2]
    k = jnp.repeat(k, group, axis=2)
    v = jnp.repeat(v, group, axis=2)
    return attention.mha(q, k, v, segment_ids, causal=True, interpret=target_platform() == "cpu")


def _cudnn(q: Array, k: Array, v: Array, segment_ids: Any, per_head: Any, options: KernelOptions) -> Array:
    window = None if options.window is None else (options.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=1.0, is_causal=True, local_window_size=window, implementation="cudnn"
    )


KERNELS = {"blockwise": _blockwise, "splash": _splash, "triton": _triton, "cudnn": _cudnn}
