# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Hidden states -> loss: cross entropy in float32, with the z-loss that keeps log Z near zero."""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mesh_transformer.mesh import psum_or_scatter, axes_of, current_layout
from mesh_transformer.model.moe.router import RoutingStats


class TokenLosses(NamedTuple):
    """Sums over the tokens that count, so that parts of a batch add up to the whole."""

    nats: Float[Array, ""]  # cross entropy
    z_squares: Float[Array, ""]  # (log Z)^2
    tokens: Float[Array, ""]  # sum of the mask
    routing: RoutingStats | None = None  # of a model with experts in training: means over a microbatch, summed over these


class Scored(NamedTuple):
    """What the backward pass will multiply by one number; None where nothing is differentiated."""

    dx: Float[Array, "B T D"]
    dw: Float[Array, "D V"]
    db: Float[Array, "V"] | None


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def score_tokens(
    x: Float[Array, "B T D"],
    w: Float[Array, "D V"],
    b: Float[Array, "V"] | None,
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    z_loss: float,
    pieces: int,
) -> tuple[Float[Array, ""], TokenLosses]:
    """Cross entropy + z_loss x (log Z)^2 summed over the tokens, and the sums apart; only the first is differentiated.

    The sequence is scored in `pieces` and the gradient of each is taken at once, so that logits of one piece exist at a
    time and none is computed twice. Where the vocabulary is cut over devices, each scores its own part of it: what
    moves are three numbers for each token and the sum of dx, never logits.
    """
    return _score(x, w, b, targets, mask, z_loss, pieces, differentiate=False)[0]


def _score_forward(x: Array, w: Array, b: Any, targets: Array, mask: Array, z_loss: float, pieces: int) -> tuple:
    return _score(x, w, b, targets, mask, z_loss, pieces, differentiate=True)


def _score_backward(z_loss: float, pieces: int, scored: Scored, gradients: tuple) -> tuple:
    grown = jax.tree.map(lambda d: d * gradients[0].astype(d.dtype), scored)
    return (*grown, None, None)


score_tokens.defvjp(_score_forward, _score_backward)


def _score(
    x: Array, w: Array, b: Any, targets: Array, mask: Array, z_loss: float, pieces: int, *, differentiate: bool
) -> tuple[tuple[Array, TokenLosses], Scored | None]:
    layout, w = current_layout(), w.astype(x.dtype)
    options: dict[str, Any] = dict(z_loss=z_loss, pieces=pieces, differentiate=differentiate)
    if layout is None:
        return _score_here(x, w, b, targets, mask, (), (), (), **options)
    tokens = layout.spec(("batch", "sequence"), targets.shape, "activation [targets]")
    stream = layout.spec(("batch", "sequence", "activation_embed"), x.shape, "activation [hidden]")
    whole = layout.spec(
        ("activation_embed", "vocab"), w.shape, "w_head"
    )  # gathered along embed, which the batch may lie on too
    vocab = layout.spec(("vocab",), w.shape[1:], "w_head")
    rows_on, vocab_on = (tuple(a for part in spec for a in axes_of(part)) for spec in (tokens, vocab))
    own = layout.spec(("embed", "vocab"), w.shape, "w_head")
    embed_on = axes_of(own[0]) if len(own) else ()
    if not set(embed_on) <= set(rows_on):
        own, embed_on = whole, ()
    # As trees of places these have the types of what lies there.
    whole_number = cast(Any, P())
    losses = (P(), TokenLosses(whole_number, whole_number, whole_number))
    places = [cast(Any, place) for place in (stream, own, None if b is None else vocab)]
    scored = Scored(*places) if differentiate else None
    return jax.shard_map(
        partial(_score_here, rows_on=rows_on, vocab_on=vocab_on, embed_on=embed_on, **options),
        mesh=layout.mesh,
        in_specs=(stream, whole, vocab, tokens, tokens),
        out_specs=(losses, scored),
        check_vma=False,
    )(x, w, b, targets, mask)


def _score_here(
    x: Array,
    w: Array,
    b: Any,
    targets: Array,
    mask: Array,
    rows_on: tuple[str, ...],
    vocab_on: tuple[str, ...],
    embed_on: tuple[str, ...],
    *,
    z_loss: float,
    pieces: int,
    differentiate: bool,
) -> tuple[tuple[Array, TokenLosses], Scored | None]:
    """This device's tokens against its part of the vocabulary; sums over all devices."""
    first = jax.lax.axis_index(vocab_on) * w.shape[1] if vocab_on else 0
    over_vocab = partial(psum_or_scatter, axes=vocab_on)

    def score(carry: tuple, piece: tuple) -> tuple[tuple, Array | None]:
        x, targets, mask = (part.reshape(-1, *part.shape[2:]) for part in piece)
        logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
        if b is not None:
            logits = logits + b[None]
        high = jnp.max(logits, axis=-1)
        high = jax.lax.pmax(high, vocab_on) if vocab_on else high
        exps = jnp.exp(logits - high[:, None])
        total = over_vocab(jnp.sum(exps, axis=-1))
        is_target = (targets - first)[:, None] == jnp.arange(w.shape[1])[None]
        log_z = high + jnp.log(total)
        nats = log_z - over_vocab(jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1))
        sums = TokenLosses(jnp.sum(nats * mask), jnp.sum(jnp.square(log_z) * mask), jnp.sum(mask))
        if not differentiate:
            return (jax.tree.map(jnp.add, carry[0], sums), *carry[1:]), None
        along = mask * (1.0 + 2.0 * z_loss * log_z) / total
        d = exps * along[:, None] - jnp.where(is_target, mask[:, None], 0.0)
        narrow = d.astype(x.dtype)
        dx = over_vocab(jnp.matmul(narrow, w.T, preferred_element_type=jnp.float32)).astype(x.dtype)
        dw = carry[1] + jnp.matmul(x.T, narrow, preferred_element_type=jnp.float32)
        db = None if b is None else carry[2] + jnp.sum(d, axis=0)
        return (jax.tree.map(jnp.add, carry[0], sums), dw, db), dx

    zero = jnp.zeros(())
    grads = (jnp.zeros(w.shape), None if b is None else jnp.zeros(b.shape)) if differentiate else (None, None)
    carry = (TokenLosses(zero, zero, zero), *grads)
    batch, length, width = x.shape
    if pieces == 1:
        (sums, dw, db), dx = score(carry, (x, targets, mask))
    else:
        cut = lambda x: x.reshape(batch, pieces, -1, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
        (sums, dw, db), dx = jax.lax.scan(score, carry, (cut(x), cut(targets), cut(mask)))
        dx = None if dx is None else dx.reshape(pieces, batch, -1, width).swapaxes(0, 1)
    sums = psum_or_scatter(sums, rows_on)
    losses = (sums.nats + z_loss * sums.z_squares, sums)
    if dx is None:
        return losses, None
    # Added up once, each device keeping its own rows where the weight is cut along embed.
    dw = psum_or_scatter(dw, rows_on, scatter_axes=embed_on)
    return losses, Scored(dx.reshape(batch, length, width), dw, psum_or_scatter(db, rows_on))
