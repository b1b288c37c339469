# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Bytes sent over each mesh axis, from compiled programs, compared with values computed by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mesh_transformer.config import MeshConfig
from mesh_transformer.mesh import MESH_AXES, make_layout
from mesh_transformer.plan.hlo.collectives import read_collectives, sent_bytes
from mesh_transformer.plan.hlo.parser import HloModule
from mesh_transformer.plan.hlo.traffic import hbm_bytes, stacked_bytes

LAYERS, BATCH, DIM = 5, 16, 32


def compile_text(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.fixture(scope="module")
def mesh():
    return make_layout(MeshConfig(data=2, fsdp=2, tensor=2)).mesh


def shaped(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def test_collectives_in_a_loop_are_multiplied_by_its_trip_count(mesh):
    """x [batch over data, dim over tensor] times w [dim over tensor, dim] leaves partial sums, reduced over tensor."""

    def layers(x, w):
        def layer(x, _):
            y = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P("data", None)))
            return jax.lax.with_sharding_constraint(jnp.tanh(y), NamedSharding(mesh, P("data", "tensor"))), None

        return jax.lax.scan(layer, x, None, length=LAYERS)[0]

    text = compile_text(layers, shaped(mesh, (BATCH, DIM), "data", "tensor"), shaped(mesh, (DIM, DIM), "tensor"))
    (row,) = read_collectives(HloModule(text), mesh.devices.shape, MESH_AXES)
    assert (row.axes, row.kind, row.group, row.count) == (("tensor",), "all-reduce", 2, LAYERS)
    put_in = (BATCH // 2) * DIM * 4
    assert row.sent == LAYERS * 2 * put_in * (2 - 1) / 2


def test_gathers_and_sums_name_their_axes(mesh):
    """A weight over fsdp is gathered; a sum over the batch over data and fsdp is reduced over both."""

    def loss(x, w):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        return jnp.sum(jnp.square(x @ w), axis=0)

    text = compile_text(loss, shaped(mesh, (BATCH, DIM), ("data", "fsdp")), shaped(mesh, (DIM, DIM), "fsdp"))
    rows = {row.kind: row for row in read_collectives(HloModule(text), mesh.devices.shape, MESH_AXES)}
    assert set(rows) == {"all-gather", "all-reduce"}
    assert rows["all-gather"].axes == ("fsdp",)
    assert rows["all-gather"].sent == DIM * DIM * 4 / 2 * (2 - 1)
    assert rows["all-reduce"].axes == ("data", "fsdp")
    assert rows["all-reduce"].sent == 2 * DIM * 4 * (4 - 1) / 4


HLO = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: bf16[4,128]) -> bf16[8,128] {
  %p = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, GROUPS, frontend_attributes={chain_id="7"}
}

%done (q: bf16[4,128]) -> bf16[8,128] {
  %q = bf16[4,128]{1,0} parameter(0)
  ROOT %gather.2 = bf16[8,128]{1,0} all-gather(%q), channel_id=1, GROUPS, frontend_attributes={chain_id="7"}
}

%all-reduce-scatter (r: f32[16,8]) -> f32[8,8] {
  %r = f32[16,8]{1,0} parameter(0)
  %sum.1 = f32[16,8]{1,0} all-reduce(%r), channel_id=2, replica_groups=mesh['x'=4,'y'=2] {'y'}, to_apply=%add
  %zero.1 = s32[] constant(0)
  ROOT %piece = f32[8,8]{1,0} dynamic-slice(%sum.1, %zero.1, %zero.1), dynamic_slice_sizes={8,8}
}

%body (state: (s32[], bf16[4,128], f32[16,8])) -> (s32[], bf16[4,128], f32[16,8]) {
  %state = (s32[], bf16[4,128]{1,0}, f32[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = bf16[4,128]{1,0} get-tuple-element(%state), index=1
  %g = f32[16,8]{1,0} get-tuple-element(%state), index=2
  %begin = bf16[8,128]{1,0} fusion(%w), kind=kCustom, calls=%start
  %end = bf16[8,128]{1,0} fusion(%w), kind=kCustom, calls=%done
  %pieces = f32[8,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  %ring = f32[16,8]{1,0} collective-permute(%g), channel_id=3, source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}
  %token = token[] after-all()
  %away = (f32[16,8]{1,0}, u32[], token[]) send(%g, %token), channel_id=4, MEGASCALE
  %sent = token[] send-done(%away), channel_id=4, MEGASCALE
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[4,128]{1,0}, f32[16,8]{1,0}) tuple(%next, %w, %ring)
}

%condition (held: (s32[], bf16[4,128], f32[16,8])) -> pred[] {
  %held = (s32[], bf16[4,128]{1,0}, f32[16,8]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%held), index=0
  %bound = s32[]{:T(128)} constant(9)
  ROOT %more = pred[] compare(%count, %bound), direction=LT
}

ENTRY %main (x: bf16[4,128], y: f32[16,8]) -> f32[16,8] {
  %x = bf16[4,128]{1,0} parameter(0)
  %y = f32[16,8]{1,0} parameter(1)
  %first = s32[] constant(2)
  %begun = (s32[], bf16[4,128]{1,0}, /*index=2*/f32[16,8]{1,0}) tuple(%first, %x, %y)
  %loop = (s32[], bf16[4,128]{1,0}, f32[16,8]{1,0}) while(%begun), condition=%condition, body=%body
  ROOT %last = f32[16,8]{1,0} get-tuple-element(%loop), index=2
}
"""
HLO = HLO.replace("GROUPS", "replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}")
HLO = HLO.replace("MEGASCALE", 'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}')


def test_text_of_a_tpu_program():
    """Async stages count once, fused reduce-scatters as such, groups in all notations, loops from their initial count."""
    module = HloModule(HLO)
    assert module.run_counts["body"] == 9 - 2
    rows = {row.kind: row for row in read_collectives(module, (4, 2), ("data", "tensor"))}
    assert set(rows) == {"all-gather", "reduce-scatter", "collective-permute", "send"}
    assert (rows["send"].axes, rows["send"].sent) == ((), 7 * 16 * 8 * 4)
    gather, scatter, ring = rows["all-gather"], rows["reduce-scatter"], rows["collective-permute"]
    # [2,4] transposed: 0 4 | 1 5 | ...: devices two mesh rows apart
    assert (gather.axes, gather.group, gather.count, gather.sent) == (("data",), 2, 7, 7 * 4 * 128 * 2)
    assert (scatter.axes, scatter.count, scatter.sent) == (("tensor",), 7, 7 * 16 * 8 * 4 / 2)
    assert (ring.axes, ring.sent) == (("data",), 7 * 16 * 8 * 4)


def test_attributes_may_span_lines():
    """Kernel metadata may contain a table whose closing brackets are at the start of lines."""
    table = 'frontend_attributes={kernel_metadata={\n"xprof_metadata": {"blocks": "{\n}"\n}}}, metadata={op_name="a"}\n'
    noted = HLO.replace(
        "%begin = bf16[8,128]{1,0} fusion(%w), kind=kCustom, calls=%start\n",
        f"%begin = bf16[8,128]{{1,0}} fusion(%w), kind=kCustom, calls=%start, {table}",
    )
    assert noted.count("\n") == HLO.count("\n") + 3
    rows = [read_collectives(HloModule(text), (4, 2), ("data", "tensor")) for text in (HLO, noted)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4


def test_unknown_group_notations_are_an_error():
    module = HloModule(HLO.replace("replica_groups=[4,2]<=[2,4]T(1,0)", "replica_groups=by_magic"))
    with pytest.raises(ValueError, match="unknown notation of replica groups"):
        read_collectives(module, (4, 2), ("data", "tensor"))


def test_formulas():
    assert sent_bytes("all-gather", 10, 8) == 70
    assert (
        sent_bytes("all-reduce", 80, 8) == sent_bytes("reduce-scatter", 80, 8) + sent_bytes("all-gather", 10, 8) == 140
    )
    assert sent_bytes("all-to-all", 80, 8) == 70
    assert sent_bytes("collective-permute", 80, 8) == 80


def test_memory_traffic_of_slices_and_updates():
    """A loop that reads a slice of one stack and writes a slice of another moves the slices, not the stacks."""

    def layers(stack, x):
        def layer(x, w):
            return jnp.tanh(x @ w), x

        return jax.lax.scan(layer, x, stack)

    stack, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((LAYERS, DIM, DIM), (BATCH, DIM)))
    module = HloModule(compile_text(layers, stack, x))
    stack_bytes, layer_bytes = LAYERS * DIM * DIM * 4, (DIM * DIM + 3 * BATCH * DIM) * 4
    assert stack_bytes < hbm_bytes(module) < 4 * LAYERS * layer_bytes
    assert stacked_bytes(module).activations == LAYERS * BATCH * DIM * 4
