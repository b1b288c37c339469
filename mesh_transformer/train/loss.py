# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Training loss of hidden states: cross entropy in float32, with the z-loss that keeps log Z near zero.

loss = -log softmax(logits)[target] + z_loss (log Z)^2        Z = sum(exp(logits)) over the vocabulary
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mesh_transformer.config import Config, ConfigError, ModelConfig
from mesh_transformer.mesh import axes_of, current_layout, psum_or_scatter
from mesh_transformer.model.formulas import finish_logits
from mesh_transformer.model.moe.router import RoutingStats


class TokenLosses(NamedTuple):
    """Sums over the tokens that the mask selects, so that the sums of microbatches add up to the sums of a batch."""

    sum_loss: Float[Array, ""]  # cross entropy, in nats
    sum_log_z_squared: Float[Array, ""]
    tokens: Float[Array, ""]  # sum of the mask
    routing: RoutingStats | None = None  # in training with experts: means over a microbatch, summed over microbatches


class LossOptions(NamedTuple):
    """Static arguments of `chunked_cross_entropy`."""

    model: ModelConfig
    z_loss: float
    chunks: int  # number of chunks of a sequence, which are processed one after the other


def loss_options(config: Config) -> LossOptions:
    """Return the loss options of a run."""
    return LossOptions(config.model, config.train.z_loss, config.train.loss_chunks)


def require_head(model: ModelConfig) -> None:
    """Raise ConfigError if a model computes no logits, which the loss requires."""
    if model.head == "none":
        raise ConfigError(
            'model.head="none" computes no logits, which the loss requires; set model.head="lm" or "masked-lm"'
        )


class SavedGradients(NamedTuple):
    """Gradients of the loss, computed in the forward pass and saved for the backward pass."""

    dx: Float[Array, "B T D"]
    dw: Float[Array, "D V"]
    db: Float[Array, "V"] | None


class _MeshAxes(NamedTuple):
    """Mesh axes over which dimensions of the arguments are sharded."""

    tokens: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def chunked_cross_entropy(
    x: Float[Array, "B T D"],
    w: Float[Array, "D V"],
    b: Float[Array, "V"] | None,
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    options: LossOptions,
) -> tuple[Float[Array, ""], TokenLosses]:
    """Return the loss summed over the tokens, and its parts; only the loss is differentiable.

    The sequence is scored in chunks, and the gradient of each chunk is computed with its logits, so that the logits of
    one chunk exist at a time and none are computed twice. If the vocabulary is sharded, each device scores one
    shard: only three numbers per token and the sum of dx are communicated, never logits.
    """
    return _cross_entropy(x, w, b, targets, mask, options, differentiate=False)[0]


def _forward(x: Array, w: Array, b: Any, targets: Array, mask: Array, options: LossOptions) -> tuple:
    return _cross_entropy(x, w, b, targets, mask, options, differentiate=True)


def _backward(options: LossOptions, saved: SavedGradients, cotangents: tuple) -> tuple:
    scaled = jax.tree.map(lambda d: d * cotangents[0].astype(d.dtype), saved)
    return (*scaled, None, None)


chunked_cross_entropy.defvjp(_forward, _backward)


def _cross_entropy(
    x: Array, w: Array, b: Any, targets: Array, mask: Array, options: LossOptions, *, differentiate: bool
) -> tuple[tuple[Array, TokenLosses], SavedGradients | None]:
    layout = current_layout()
    w = w.astype(x.dtype)
    if layout is None:
        return _local_cross_entropy(options, _MeshAxes(), differentiate, (x, w, b), targets, mask)
    token_spec = layout.spec(("batch", "sequence"), targets.shape, "activation [targets]")
    x_spec = layout.spec(("batch", "sequence", "activation_embed"), x.shape, "activation [hidden]")
    # The weight is gathered along embed, which may be sharded over the same mesh axes as the batch.
    w_spec = layout.spec(("activation_embed", "vocab"), w.shape, "w_head")
    b_spec = layout.spec(("vocab",), w.shape[1:], "b_head")
    token_axes = tuple(axis for part in token_spec for axis in axes_of(part))
    vocab_axes = tuple(axis for part in b_spec for axis in axes_of(part))
    dw_spec = layout.spec(("embed", "vocab"), w.shape, "w_head")
    embed_axes = axes_of(dw_spec[0]) if len(dw_spec) else ()
    if not set(embed_axes) <= set(token_axes):
        dw_spec, embed_axes = w_spec, ()
    # The annotations of the named tuples are array types, but out_specs contain partition specs: hence the casts.
    scalar = cast(Any, P())
    loss_specs = (P(), TokenLosses(scalar, scalar, scalar))
    gradient_specs = SavedGradients(*(cast(Any, spec) for spec in (x_spec, dw_spec, None if b is None else b_spec)))
    axes = _MeshAxes(token_axes, vocab_axes, embed_axes)
    return jax.shard_map(
        partial(_local_cross_entropy, options, axes, differentiate),
        mesh=layout.mesh,
        in_specs=((x_spec, w_spec, b_spec), token_spec, token_spec),
        out_specs=(loss_specs, gradient_specs if differentiate else None),
        check_vma=False,
    )((x, w, b), targets, mask)


def _local_cross_entropy(
    options: LossOptions,
    axes: _MeshAxes,
    differentiate: bool,
    operands: tuple[Array, Array, Any],
    targets: Array,
    mask: Array,
) -> tuple[tuple[Array, TokenLosses], SavedGradients | None]:
    """Compute the loss of this device's tokens with its vocabulary shard; the result is summed over all devices."""
    x, w, b = operands
    first = jax.lax.axis_index(axes.vocab) * w.shape[1] if axes.vocab else 0
    sum_over_vocab = partial(psum_or_scatter, axes=axes.vocab)
    finish = partial(finish_logits, config=options.model)

    def score(carry: tuple, chunk: tuple) -> tuple[tuple, Array | None]:
        x, targets, mask = (part.reshape(-1, *part.shape[2:]) for part in chunk)
        logits, logits_vjp = jax.vjp(finish, jnp.matmul(x, w, preferred_element_type=jnp.float32), b)
        maximum = jnp.max(logits, axis=-1)
        maximum = jax.lax.pmax(maximum, axes.vocab) if axes.vocab else maximum
        exps = jnp.exp(logits - maximum[:, None])
        total = sum_over_vocab(jnp.sum(exps, axis=-1))
        is_target = (targets - first)[:, None] == jnp.arange(w.shape[1])[None]
        log_z = maximum + jnp.log(total)
        losses = log_z - sum_over_vocab(jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1))
        sums = TokenLosses(jnp.sum(losses * mask), jnp.sum(jnp.square(log_z) * mask), jnp.sum(mask))
        if not differentiate:
            return (jax.tree.map(jnp.add, carry[0], sums), *carry[1:]), None
        scale = mask * (1.0 + 2.0 * options.z_loss * log_z) / total
        d_logits = exps * scale[:, None] - jnp.where(is_target, mask[:, None], 0.0)
        d_product, d_bias = logits_vjp(d_logits)
        d_product = d_product.astype(x.dtype)
        dx = sum_over_vocab(jnp.matmul(d_product, w.T, preferred_element_type=jnp.float32)).astype(x.dtype)
        dw = carry[1] + jnp.matmul(x.T, d_product, preferred_element_type=jnp.float32)
        db = None if b is None else carry[2] + d_bias
        return (jax.tree.map(jnp.add, carry[0], sums), dw, db), dx

    zero = jnp.zeros(())
    grads = (jnp.zeros(w.shape), None if b is None else jnp.zeros(b.shape)) if differentiate else (None, None)
    carry = (TokenLosses(zero, zero, zero), *grads)
    batch, length, d_model = x.shape
    if options.chunks == 1:
        (sums, dw, db), dx = score(carry, (x, targets, mask))
    else:

        def split(x: Array) -> Array:
            return x.reshape(batch, options.chunks, -1, *x.shape[2:]).swapaxes(0, 1)

        (sums, dw, db), dx = jax.lax.scan(score, carry, (split(x), split(targets), split(mask)))
        dx = None if dx is None else dx.reshape(options.chunks, batch, -1, d_model).swapaxes(0, 1)
    sums = psum_or_scatter(sums, axes.tokens)
    losses = (sums.sum_loss + options.z_loss * sums.sum_log_z_squared, sums)
    if dx is None:
        return losses, None
    # dw is reduced once, after all chunks. If w is sharded along embed, each device keeps the rows of its shard.
    dw = psum_or_scatter(dw, axes.tokens, scatter_axes=axes.embed)
    return losses, SavedGradients(dx.reshape(batch, length, d_model), dw, psum_or_scatter(db, axes.tokens))
