# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Selection of the attention kernel by platform, equality with the dense kernel, and errors for unsupported requests."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import ConfigError, MeshConfig, ModelConfig
from mesh_transformer.mesh import RULES, MeshLayout, make_layout, use_layout
from mesh_transformer.model.attention.kernels import choose_kernel, dispatch_attention
from mesh_transformer.model.attention.masks import AttentionContext, Masks

ROOT = Path(__file__).parents[3]
T = 128
MODEL = ModelConfig(
    n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, n_vocab=32, seq_len=T, positions="rope-half", d_head=16,
    attention_pattern=("global", "local"), attention_window=40,
)  # fmt: skip
GLOBAL = dataclasses.replace(MODEL, attention_pattern=("global",))


def on(platform: str, kind: str) -> MeshLayout:
    """Return the layout of a single device of another platform."""
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform, device_kind=kind)]), size=1, shape={})
    return MeshLayout(mesh, RULES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("platform", "kind", "changes", "has_segments", "kernel"),
    [
        ("tpu", "TPU v4", {}, True, "splash"),
        ("tpu", "TPU v5p", {}, False, "splash"),
        ("tpu", "TPU v3", {}, True, "blockwise"),
        ("tpu", "TPU v4", dict(positions="alibi"), False, "blockwise"),
        ("tpu", "TPU v4", dict(positions="t5"), False, "dense"),
        ("tpu", "TPU v4", dict(dropout=0.1), False, "dense"),
        ("gpu", "NVIDIA H100", dict(dtype="bfloat16"), False, "cudnn"),
        ("gpu", "NVIDIA H100", dict(dtype="bfloat16"), True, "blockwise"),
        ("gpu", "NVIDIA H100", dict(dtype="bfloat16", attention_pattern=("global",)), True, "triton"),
        ("gpu", "NVIDIA H100", dict(attention_pattern=("global",)), False, "triton"),
        ("cpu", "cpu", {}, True, "dense"),
    ],
)
def test_kernel_is_chosen_by_platform(platform, kind, changes, has_segments, kernel):
    config = dataclasses.replace(MODEL, **changes)
    with use_layout(on(platform, kind)):
        assert choose_kernel(config, T, has_segments=has_segments, cached=False) == kernel
        assert choose_kernel(config, T, has_segments=has_segments, cached=True) == "dense"
    if platform == "cpu":
        assert choose_kernel(config, 2048, has_segments=has_segments, cached=False) == "blockwise"


@pytest.mark.parametrize(
    ("platform", "changes", "length", "reason"),
    [
        ("cpu", dict(attention_kernel="blockwise", positions="t5"), T, "does not support the T5 bias"),
        ("cpu", dict(attention_kernel="splash", dropout=0.1), T, "does not support dropout"),
        ("cpu", dict(attention_kernel="splash"), 100, "divisible by 128, not 100"),
        ("gpu", dict(attention_kernel="splash"), T, "runs on TPUs only"),
        ("tpu", dict(attention_kernel="triton"), T, "runs on GPUs only"),
        ("gpu", dict(attention_kernel="triton"), T, "does not support attention windows"),
        ("gpu", dict(attention_kernel="cudnn"), T, "bfloat16"),
        ("cpu", dict(attention_kernel="blockwise"), 4099, "cannot divide 4099 positions evenly"),
    ],
)
def test_unsupported_requests_are_refused(platform, changes, length, reason):
    config = dataclasses.replace(MODEL, **changes)
    with (
        use_layout(on(platform, platform)),
        pytest.raises(ConfigError, match=rf'attention_kernel = .*{reason}.*"dense"'),
    ):
        choose_kernel(config, length, has_segments=False, cached=False)


def test_a_sharded_sequence_is_never_gathered_silently():
    with use_layout(make_layout(MeshConfig(data=1, context=4))):
        assert choose_kernel(MODEL, T, has_segments=True, cached=False) == "blockwise"
        with pytest.raises(ConfigError, match=r'does not support dropout \(model.dropout=0.1\); use "dense"'):
            choose_kernel(dataclasses.replace(MODEL, dropout=0.1), T, has_segments=True, cached=False)
        with pytest.raises(ConfigError, match="does not support ring attention"):
            choose_kernel(dataclasses.replace(MODEL, attention_kernel="splash"), T, has_segments=True, cached=False)


@pytest.mark.parametrize(
    ("kernel", "local", "tensor"),
    [("splash", False, 4), ("splash", True, 1), ("triton", False, 1), ("blockwise", True, 4)],
)
def test_kernels_equal_the_dense_kernel_forward_and_backward(kernel, local, tensor):
    """The kernels are interpreted on this CPU; two key-value heads on four devices are replicated."""
    config = MODEL if local else GLOBAL
    keys = jax.random.split(jax.random.key(0), 4)
    q, gradient = (jax.random.normal(key, (2, T, 4, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, T, 2, 16)) for key in keys[2:])
    segment_ids = jnp.asarray(np.repeat([[1, 2, 3, 3], [1, 1, 2, 2]], T // 4, axis=1), jnp.int32)
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    full = (distance >= 0)[None] & (segment_ids[:, :, None] == segment_ids[:, None])
    masks = Masks(full, full & (distance < 40)[None], None)
    positions = jnp.zeros((2, T), jnp.int32)
    dense = AttentionContext("dense", positions, segment_ids, masks)
    other = AttentionContext(kernel, positions, segment_ids, None)

    def run(context: AttentionContext, layout: MeshLayout | None):
        def both(q, k, v):
            with use_layout(layout):
                out, back = jax.vjp(lambda q, k, v: dispatch_attention(q, k, v, config, local, context), q, k, v)
                return out, back(gradient)

        return jax.jit(both)(q, k, v)

    layout = make_layout(MeshConfig(data=1, tensor=tensor, rules={"kv_heads": ""}))
    wanted = run(dense, None)
    found = run(other, layout if tensor > 1 else None)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


# Description of an H100 for XLA to compile for.
H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from mesh_transformer.config import MeshConfig, ModelConfig
from mesh_transformer.mesh import make_layout, use_layout
from mesh_transformer.model.transformer import make_model
from mesh_transformer.model.shapes import describe_params

platform, kernel, target = sys.argv[1:]
try:
    if platform == "tpu":
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    else:
        devices = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x4").devices
except (RuntimeError, NotImplementedError) as error:
    print("absent:", error)
    sys.exit()
layout = make_layout(MeshConfig(data=2, tensor=2), devices)
config = ModelConfig(
    n_layers=1, d_model=128, n_heads=4, n_kv_heads=2, n_vocab=128, seq_len=256, positions="rope-half",
    dtype="bfloat16", attention_kernel=kernel,
)

def array(axes, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes, shape, "x"))

params = {
    module: {name: array(info.axes, info.shape, jnp.float32) for name, info in infos.items()}
    for module, infos in describe_params(config).items()
}
tokens = array(("batch", "sequence"), (4, 256), jnp.int32)
with use_layout(layout):
    def loss(params, tokens, segment_ids):
        return jnp.sum(make_model(config).hidden_states(params, tokens, segment_ids=segment_ids)[0].astype(jnp.float32))

    fast = {"exec_time_optimization_effort": -1.0} if platform == "tpu" else {}
    program = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).compile(compiler_options=fast).as_text()
print("calls:", program.count('custom_call_target="tpu_custom_call"'), program.count("__gpu$xla.gpu.triton"))
"""


@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "auto"), ("cuda", "triton")])
def test_kernels_compile_for_an_absent_chip(platform, kernel):
    """The TPU case tests the selection too: this process runs on a CPU, and the program gets the kernel of the TPU."""
    pytest.importorskip("libtpu" if platform == "tpu" else "jax_cuda13_plugin")
    tpu = dict(TPU_ACCELERATOR_TYPE="v5litepod-8", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    environment = {**os.environ, **tpu, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}
    command = [sys.executable, "-c", PROGRAM, platform, kernel, H100]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**environment, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if done.stdout.startswith("absent:"):
        pytest.skip(done.stdout)
    tpu_calls, gpu_calls = map(int, done.stdout.split()[1:])
    assert (tpu_calls if platform == "tpu" else gpu_calls) >= 2, "forward and backward do not both use this kernel"
