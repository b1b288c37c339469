# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The sharding rules are strict, the sharding table is exact, and a sharded model equals one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mesh_transformer.config import ConfigError, MeshConfig, ModelConfig
from mesh_transformer.mesh import RULES, constrain, format_sharding_table, make_layout, make_rules, use_layout
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.model.transformer import make_model

# Halves the compile time.
QUICK: dict[str, bool | int | float | str] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def make(data: int = 1, fsdp: int = 1, tensor: int = 1, **rules):
    return make_layout(MeshConfig(data=data, fsdp=fsdp, tensor=tensor, rules=rules))


# Strictness
def test_unknown_logical_axis_is_refused():
    with pytest.raises(ConfigError, match=r"attention/w_q: no rule for the logical axis 'hats'; add mesh\.rules\.hats"):
        make(fsdp=2).spec(("embed", "hats"), (4, 4), "attention/w_q")


def test_mesh_axis_used_twice_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"w_x: the logical axes 'heads' and 'ff' are both sharded over the mesh axis 'tensor'; .*mesh\.rules\.ff = \"\"",
    ):
        make(tensor=2).spec(("heads", "ff"), (4, 4), "w_x")
    assert make(tensor=1, fsdp=2).spec(("heads", "ff"), (4, 4), "w_x") == P()  # a mesh axis of size 1 shards nothing


def test_indivisible_size_is_refused():
    with pytest.raises(
        ConfigError, match=r'w_tokens: vocab = 257 is not divisible by tensor = 4; .*mesh\.rules\.vocab = ""'
    ):
        make(tensor=4).spec(("vocab", "embed"), (257, 8), "w_tokens")
    with pytest.raises(ConfigError, match=r"batch = 6 is not divisible by data x fsdp = 4"):
        make(data=2, fsdp=2).spec(("batch",), (6,), "tokens")
    assert make(tensor=4, vocab="").spec(("vocab", "embed"), (257, 8), "w_tokens") == P()


def test_every_dimension_needs_an_axis():
    with pytest.raises(ValueError, match="zip"):
        make(tensor=4).spec(("vocab",), (8, 8), "w")


def test_indivisible_activation_is_refused():
    with (
        use_layout(make(data=4)),
        pytest.raises(ConfigError, match=r"activation \[batch, activation_embed\]: batch = 6"),
    ):
        constrain(jnp.zeros((6, 2)), "batch", "activation_embed")


def test_unknown_rules_are_refused():
    with pytest.raises(ConfigError, match=r"mesh\.rules\.embd: unknown logical axis; use one of layers, embed"):
        make_rules({"embd": "fsdp"})
    with pytest.raises(
        ConfigError,
        match=r"mesh\.rules\.embed: unknown mesh axis 'model'; use one of data, pipeline, fsdp, expert, context, tensor",
    ):
        make_rules({"embed": ["fsdp", "model"]})
    assert (
        make_rules({"embed": "fsdp tensor"})["embed"]
        == ("fsdp", "tensor")
        == make_rules({"embed": ["fsdp", "tensor"]})["embed"]
    )
    assert make_rules({}) == RULES


@pytest.mark.parametrize(
    "sizes", [dict(data=16), dict(data=3, fsdp=3), dict(data=-1, fsdp=3), dict(data=-1, tensor=16)]
)
def test_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(ConfigError, match=r"mesh: data=.* does not fit 8 device\(s\).*cpu_devices"):
        make_layout(MeshConfig(**sizes))


def test_mesh_uses_the_remaining_or_the_first_devices():
    assert dict(make(-1, 2, 2).mesh.shape) == {
        "data": 2,
        "pipeline": 1,
        "fsdp": 2,
        "expert": 1,
        "context": 1,
        "tensor": 2,
    }
    assert list(make(2, 1, 2).mesh.devices.flat) == jax.devices()[:4]
    layout = make(2, 2, 2)
    assert layout.batch_shards == 4
    assert layout.spec(("batch", "sequence"), (8, 3), "tokens") == P(("data", "fsdp"))


def test_ring_attention_needs_one_mesh_axis():
    with pytest.raises(
        ConfigError, match=r"mesh\.rules\.sequence: ring attention needs exactly one mesh axis, got fsdp and context"
    ):
        make_layout(MeshConfig(data=1, fsdp=2, context=2, rules={"sequence": "fsdp context"}))


def test_one_axis_spans_the_slices():
    """Devices 0-3 are one slice, 4-7 another. Only `data` (or `pipeline`) spans both."""
    for sizes, outer in ((dict(data=2, tensor=4), "data"), (dict(pipeline=2, fsdp=2, tensor=2), "pipeline")):
        mesh = make_layout(MeshConfig(**{"data": 1, **sizes}, slices=2)).mesh
        ids = np.vectorize(lambda device: device.id)(mesh.devices)
        for half, part in enumerate(np.split(ids, 2, axis=mesh.axis_names.index(outer))):
            assert set(part.flat) == set(range(4 * half, 4 * half + 4))
    with pytest.raises(ConfigError, match=r"cannot be split into slices=2 along data=1 or pipeline=1"):
        make_layout(MeshConfig(data=1, tensor=8, slices=2))


def test_layout_is_restored_after_use():
    x = jnp.zeros((8, 4))
    with use_layout(make(data=8)):
        assert constrain(x, "batch", "activation_embed").sharding.spec == P("data")
    assert constrain(x, "batch", "activation_embed") is x
    with pytest.raises(ConfigError), use_layout(make(data=8)):
        constrain(x[:7], "batch", "activation_embed")
    assert constrain(x, "batch", "activation_embed") is x


TABLE = """\
parameter           shape           axes         spec         bytes/device
transformer/w_x     4 x 8           embed ff     fsdp tensor            32
transformer/scale   8               embed        fsdp                   16
transformer/w_pos   3               position     replicated             12
transformer/w_both  16 x 4          vocab embed  tensor fsdp            64
total               107 parameters                                     124"""


def test_sharding_table():
    rows = {
        "transformer/w_x": ((4, 8), ("embed", "ff"), 4),
        "transformer/scale": ((8,), ("embed",), 4),
        "transformer/w_pos": ((3,), ("position",), 4),
        "transformer/w_both": ((16, 4), ("vocab", "embed"), 4),
    }
    table = format_sharding_table(rows, make(2, 2, 2))
    assert [line.rstrip() for line in table.splitlines()] == TABLE.splitlines(), table


# Sharded = one device
B, T = 8, 8
FAMILIES = {
    "t5, tied": dict(positions="t5"),
    "umt5": dict(positions="t5", t5_shared_bias=False),
    "rotary, grouped": dict(
        positions="rope-interleaved",
        residual="parallel",
        n_kv_heads=4,
        gated_ffn=True,
        head_bias=True,
        tied_embeddings=False,
        remat="full",
    ),
    "olmo2": dict(
        norm="rmsnorm",
        residual="reordered-norm",
        qk_norm="rmsnorm-all-heads",
        clip_qkv=0.5,
        positions="rope-half",
        rope_pattern=(True, False),
        n_kv_heads=4,
        gated_ffn=True,
    ),
    "gemma2": dict(
        norm="gemma-rmsnorm",
        residual="sandwich",
        positions="rope-half",
        n_kv_heads=4,
        gated_ffn=True,
        attention_pattern=("local", "global"),
        attention_window=3,
        attention_softcap=2.0,
        logit_softcap=3.0,
        embedding_scale="sqrt_d_model",
    ),
    "falcon-alibi, embedding norm, clip": dict(
        positions="falcon-alibi", n_kv_heads=4, embedding_norm=True, clip_qkv=0.8, norm_bias=False
    ),
    "position offset": dict(position_offset=3, clip_qkv=0.8),
    "opt-350m": dict(residual="post-norm", d_token_embedding=8),
}


def make_family(name: str, **changes) -> ModelConfig:
    return ModelConfig(
        **{
            **dict(n_layers=2, d_model=16, n_heads=8, d_head=4, n_vocab=32, d_ff=24, seq_len=T),
            **FAMILIES[name],
            **changes,
        }
    )


def make_inputs(config: ModelConfig):
    rng = np.random.default_rng(0)
    params = {
        module: {leaf: jnp.asarray(0.3 * rng.normal(size=info.shape), jnp.float32) for leaf, info in infos.items()}
        for module, infos in describe_params(config).items()
    }
    return params, *jnp.asarray(rng.integers(0, config.n_vocab, (2, B, T)), jnp.int32)


def make_loss(config: ModelConfig):
    model = make_model(config)

    def loss(params, tokens, targets):
        logits, _ = model.apply(params, tokens)
        log_p = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(log_p, targets[..., None], axis=-1))

    return jax.value_and_grad(loss)


@pytest.fixture(scope="module")
def one_device():
    """Inputs, loss and gradients of each family on one device, computed once."""
    computed = {}

    def compute(name: str):
        if name not in computed:
            inputs = make_inputs(make_family(name))
            computed[name] = inputs, jax.jit(make_loss(make_family(name)), compiler_options=QUICK)(*inputs)
        return computed[name]

    return compute


@pytest.mark.parametrize(
    ("sizes", "name", "rules"),
    [
        ((8, 1, 1), "rotary, grouped", {}),
        ((1, 8, 1), "t5, tied", {}),
        ((1, 1, 8), "t5, tied", {}),
        ((2, 2, 2), "rotary, grouped", {}),
        ((2, 2, 2), "gemma2", {}),
        ((2, 2, 2), "olmo2", {}),
        ((2, 2, 2), "falcon-alibi, embedding norm, clip", {"activation_seq": "tensor"}),
        ((1, 4, 2), "position offset", {}),
        ((2, 2, 2), "opt-350m", {}),
        ((1, 2, 4), "umt5", {"activation_seq": "tensor"}),
        ((1, 2, 4), "t5, tied", {"activation_seq": "tensor", "vocab": ""}),
        ((2, 1, 4), "rotary, grouped", {"kv_heads": "", "embed": ""}),
    ],
)
def test_sharded_equals_one_device(one_device, sizes, name, rules):
    config, layout = make_family(name), make(*sizes, **rules)
    (params, tokens, targets), (loss, gradients) = one_device(name)
    shardings = {
        module: {leaf: layout.sharding(info.axes, info.shape, f"{module}/{leaf}") for leaf, info in infos.items()}
        for module, infos in describe_params(config).items()
    }
    batch = layout.sharding(("batch", "sequence"), tokens.shape, "tokens")
    replicated = jax.NamedSharding(layout.mesh, P())
    with use_layout(layout):
        step = jax.jit(
            make_loss(config),
            in_shardings=(shardings, batch, batch),
            out_shardings=(replicated, shardings),
            compiler_options=QUICK,
        )
        sharded_params = jax.device_put(params, shardings)
        sharded_loss, sharded_gradients = step(
            sharded_params, jax.device_put(tokens, batch), jax.device_put(targets, batch)
        )

    # Weights and gradients are really sharded over fsdp and tensor, and the batch over data and fsdp.
    _, fsdp, tensor = sizes
    for tree in (sharded_params, sharded_gradients):
        w_in = tree["transformer/layers/block_0/feed_forward"]["w_in"]
        shard = w_in.addressable_shards[0].data.shape
        assert shard == (w_in.shape[0], 16 // (1 if "embed" in rules else fsdp), 24 // tensor)
        assert len(w_in.addressable_shards) == 8
    assert batch.shard_shape(tokens.shape) == (B // layout.batch_shards, T)

    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    found = flatten_names(sharded_gradients)
    for key, gradient in flatten_names(gradients).items():
        # The gradient of a key's bias is zero up to rounding: compared on the scale of the query's.
        scale = np.abs(flatten_names(gradients)[key.replace("/b_k", "/b_q")]).max()
        assert scale > 0, key
        np.testing.assert_allclose(found[key], gradient, atol=1e-5 * scale, rtol=0, err_msg=key)


def test_indivisible_heads_are_refused_before_compiling():
    layout = make(tensor=8)
    infos = describe_params(make_family("rotary, grouped"))["transformer/layers/block_0/attention"]
    with pytest.raises(
        ConfigError, match=r'attention/w_k: kv_heads = 4 is not divisible by tensor = 8; .*mesh\.rules\.kv_heads = ""'
    ):
        layout.spec(infos["w_k"].axes, infos["w_k"].shape, "attention/w_k")


def test_constrain_shards_activations():
    """Without `constrain`, the partitioner might gather the batch."""
    layout = make(2, 2, 2)
    with use_layout(layout):
        x = jax.jit(lambda x: constrain(x * 2.0, "batch", "sequence", "activation_embed"))(jnp.ones((8, 4, 6)))
    assert x.sharding.shard_shape(x.shape) == (2, 4, 6)
