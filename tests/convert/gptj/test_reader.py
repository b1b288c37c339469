# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of mesh-transformer-jax: losses equal the original program's, round trips are bit-exact, damage is rejected."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference_models import make_random_arrays

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig, parse_config
from mesh_transformer.convert.gptj import reader, writer
from mesh_transformer.convert.gptj.reader import list_leaves, open_gptj, open_raw_weights, read_model
from mesh_transformer.convert.gptj.reference import run_mtj
from mesh_transformer.convert.gptj.writer import make_external_config, write_gptj
from mesh_transformer.convert.import_plan import ImportPlan, PlannedArray, make_model_config
from mesh_transformer.convert.lazy_arrays import InMemory, full_index
from mesh_transformer.convert.logit_check import run_native
from mesh_transformer.model.positions import t5_buckets
from mesh_transformer.model.transformer import make_model
from mesh_transformer.train.state import describe_state, flatten_state

FIXTURE = Path(__file__).parents[4] / "shared" / "fixtures" / "gptj_v1_4shards"
needs_fixture = pytest.mark.skipif(
    not FIXTURE.exists(), reason="the mesh-transformer-jax fixtures are not available (../shared/fixtures)"
)
FIXTURE_CONFIG = json.loads((FIXTURE / "config.json").read_text()) if FIXTURE.exists() else {}
MTJ_CONFIG = dict(layers=12, d_model=16, n_heads=4, n_vocab=24, norm="layernorm", pe="rotary", pe_rotary_dims=2, seq=8)


def read_all(plan: ImportPlan) -> dict[str, np.ndarray]:
    return {name: array.read(full_index(array)) for name, array in plan.values.items()}


def make_plan(config: ModelConfig, arrays: Mapping[str, InMemory], step: int) -> ImportPlan:
    planned = {name: PlannedArray(array, ("unknown",) * len(array.shape)) for name, array in arrays.items()}
    return ImportPlan(config, {}, planned, step)


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape, name
        np.testing.assert_array_equal(a[name].astype(np.float32), b[name].astype(np.float32), err_msg=name)


def read_npz(path: Path) -> list[np.ndarray]:
    with np.load(path) as file:
        return [file[f"arr_{i}"] for i in range(len(file.files))]


def rewrite(path: Path, change, save=np.savez) -> None:
    save(path, *change(read_npz(path)))


def read_shard(folder: Path) -> list[np.ndarray]:
    return [leaf for i in range(reader.NPZ_FILES) for leaf in read_npz(folder / f"{i}.npz")]


@needs_fixture
@pytest.mark.parametrize("kind", ["full", "slim"])
def test_losses_equal_mesh_transformer_jax(kind):
    plan = open_gptj(FIXTURE / kind / "step_1234", FIXTURE_CONFIG)
    assert (plan.step, plan.tokenizer) == (1234, "gpt2")
    params: dict = {}
    for name, array in read_all(plan).items():
        if name.startswith("params/"):
            module, leaf = name.removeprefix("params/").rsplit("/", 1)
            params.setdefault(module, {})[leaf] = jnp.asarray(array, jnp.float32)
    expected = np.load(FIXTURE / "expected.npz")
    tokens = jnp.asarray(expected["tokens"], jnp.int32)
    config = make_model_config(plan.model, "test")
    logits, _ = jax.jit(make_model(config).apply)(params, tokens[:, :-1])
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    wanted = expected[f"{kind}_token_loss"]
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(losses, wanted, atol=1e-5, rtol=0)
    correct = np.argmax(logits, axis=-1) == tokens[:, 1:]
    np.testing.assert_array_equal(correct, expected[f"{kind}_correct"])


@needs_fixture
def test_resharding_is_bit_exact(tmp_path):
    plan = open_gptj(FIXTURE / "full/step_1234", FIXTURE_CONFIG)
    weights = {name: array for name, array in read_all(plan).items() if name.startswith("params/")}
    for shards in (1, 2, 8):
        write_gptj(tmp_path / f"{shards}", plan._replace(step=77), shards=shards, dtype="float32")
        table = json.loads((tmp_path / f"{shards}" / "config.json").read_text())
        assert table["cores_per_replica"] == shards
        again = open_gptj(tmp_path / f"{shards}" / "step_77", table)
        assert again.step == 77
        assert again.model == plan.model
        assert_same(read_all(again), weights)


@needs_fixture
def test_bfloat16_survives_a_round_trip(tmp_path):
    plan = open_gptj(FIXTURE / "slim/step_1234", FIXTURE_CONFIG)
    config = make_model_config(plan.model, "test")
    write_gptj(tmp_path / "new", plan, shards=4)
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in read_all(plan).items()}
    assert_same(read_all(open_gptj(tmp_path / "new/step_1234", FIXTURE_CONFIG)), rounded)
    # Leaves that are neither folded nor summed nor taken from one shard equal the original's byte for byte.
    external, native = read_shard(FIXTURE / "slim/step_1234/shard_3"), read_shard(tmp_path / "new/step_1234/shard_3")
    leaves = list_leaves(config)
    split = [i for i, leaf in enumerate(leaves) if leaf.layer is not None and isinstance(leaf.mapping.merge, int)]
    assert len(split) == 12 * 7
    for i in split:
        assert native[i].dtype.str == external[i].dtype.str == "|V2"
        assert native[i].tobytes() == external[i].tobytes(), leaves[i].name


@needs_fixture
def test_command_reshards_slim_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts"))
    import reshard_checkpoint

    source, settings = str(FIXTURE / "slim/step_1234"), str(FIXTURE / "config.json")
    kinds = {}
    for name, dtype in (("exact", []), ("rounded", ["--dtype", "bfloat16"])):
        arguments = [source, str(tmp_path / name), "--source-config", settings, "--format", "gptj-v1", "--shards", "2"]
        assert reshard_checkpoint.main([*arguments, *dtype, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["dtype"] == ("bfloat16" if dtype else "float32")
        assert 0 < report["max_logit_difference"] < (0.1 if dtype else 1e-5)
        kinds[name] = {leaf.dtype.str for leaf in read_npz(tmp_path / name / "step_1234/shard_1/3.npz")}
        assert json.loads((tmp_path / name / "config.json").read_text())["cores_per_replica"] == 2
    assert kinds == {"exact": {"<f4"}, "rounded": {"|V2"}}
    assert (
        reshard_checkpoint.main([source, str(tmp_path / "hf"), "--source-config", settings, "--format", "huggingface"])
        == 0
    )
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "float32"


@needs_fixture
def test_optimizer_state_has_the_names_of_a_run():
    plan = open_gptj(FIXTURE / "full/step_1234", FIXTURE_CONFIG)
    sections = dict(data={"train": {"a": {"path": "x"}}}, train={"steps": 10, "batch_size": 4})
    run = parse_config({"model": plan.model, "optimizer": {"name": "adamw"}, **sections}, where="test")
    state = flatten_state(describe_state(run)[0])
    expected = {name: leaf for name, leaf in state.items() if name.startswith(("params/", "opt_state/"))}
    assert {name: array.shape for name, array in plan.values.items()} == {k: v.shape for k, v in expected.items()}
    for name in (reader.OPT_COUNT, reader.SCHEDULE_COUNT):
        assert plan.values[name].dtype == expected[name].dtype
        assert plan.values[name].read(()) == 1234
    shards = [read_shard(FIXTURE / f"full/step_1234/shard_{s}") for s in range(4)]
    names = [leaf.name for leaf in list_leaves(run.model)]
    for start, prefix in ((1, reader.OPT_MU), (1 + len(names), reader.OPT_NU)):
        block = f"{prefix}transformer/layers/block_0/"
        # Layer 2 is after layer 11; head 5 of 8 is the second one of shard 2.
        found = plan.values[block + "attention/w_v"].read((slice(2, 3), slice(0, 64), slice(5, 6), slice(0, 8)))
        position = start + names.index("layer_2/linear_1/w")
        np.testing.assert_array_equal(found[0, :, 0], shards[2][position][:, 8:16])
        found = plan.values[block + "feed_forward/b_out"].read((slice(10, 11), slice(0, 64)))[0]
        np.testing.assert_array_equal(found, shards[0][start + names.index("layer_10/linear_5/b")])
        found = plan.values[f"{prefix}transformer/w_tokens"].read((slice(45, 46), slice(0, 64)))[0]
        np.testing.assert_array_equal(found, shards[1][start + 1][5])


OTHERS = [
    {}, {"pe": "fixed"}, {"pe": "t5"}, {"pe_rotary_dims": 64}, {"layers": 1}, {"norm": "layernorm-nobias"},
    {"norm": "rmsnorm"}, {"norm": "rmsnorm-bias"}, {"norm": "scalenorm"}, {"norm": "scalenorm-bias", "pe": "t5"},
]  # fmt: skip


@pytest.mark.parametrize("changes", OTHERS, ids=str)
@pytest.mark.parametrize("shards", [1, 4])
def test_round_trip(changes, shards, tmp_path):
    old = MTJ_CONFIG | changes
    config = make_model_config(read_model(old), "test")
    arrays, progress = make_random_arrays(config), []

    def report(stage: str, done: int, total: int) -> None:
        progress.append((done, total))

    write_gptj(tmp_path / "new", make_plan(config, arrays, 5), shards=shards, dtype="float32", progress=report)
    assert progress == sorted(progress)
    assert progress[-1] == (progress[0][1], progress[0][1])
    plan = open_gptj(tmp_path / "new/step_5", make_external_config(config, shards))
    assert plan.model == read_model(old)
    assert_same(read_all(plan), {name: array.values for name, array in arrays.items()})


@pytest.mark.parametrize("norm", reader.NORMS)
def test_native_model_equals_the_shards_for_each_norm(norm, tmp_path):
    old = MTJ_CONFIG | {"norm": norm, "layers": 2}
    config = make_model_config(read_model(old), "test")
    write_gptj(tmp_path / "new", make_plan(config, make_random_arrays(config), 5), shards=2, dtype="float32")
    folder = tmp_path / "new/step_5"
    if norm.startswith(("rmsnorm", "scalenorm")):  # the mean over shards is used: let them differ

        def differ(leaves):
            return [values * (3 if leaf.mapping.merge == "mean" else 1) for values, leaf in leaves]

        described, start = list_leaves(config), 0
        for i in range(reader.NPZ_FILES):
            leaves = read_npz(folder / f"shard_1/{i}.npz")
            own = described[start : start + len(leaves)]
            rest = leaves[len(own) :]  # the step
            np.savez(folder / f"shard_1/{i}.npz", *differ(zip(leaves, own, strict=False)), *rest)
            start += len(leaves)
    tokens = np.random.default_rng(1).integers(0, 24, (2, 8), dtype=np.int32)
    external = run_mtj(open_raw_weights(folder, old), old, tokens)
    native = run_native(config, open_gptj(folder, old).values, tokens)
    assert np.std(external) > 0.1
    np.testing.assert_allclose(native, external, atol=2e-5 * np.abs(external).max(), rtol=0)


def test_t5_buckets_equal_mesh_transformer_jax():
    distance = np.arange(4096)
    large = 16 + (np.log(np.maximum(distance, 1).astype(np.float32) / 16 + 1.2e-7) / np.log(8) * 16).astype(np.int32)
    wanted = np.where(distance < 16, distance, np.minimum(large, 31))
    config = make_model_config(read_model(MTJ_CONFIG | {"pe": "t5"}), "test")
    np.testing.assert_array_equal(t5_buckets(jnp.asarray(distance), config), wanted)


@pytest.fixture
def good(tmp_path) -> Path:
    config = make_model_config(read_model(MTJ_CONFIG), "test")
    write_gptj(tmp_path / "good", make_plan(config, make_random_arrays(config), 5), shards=4, dtype="float32")
    assert open_gptj(tmp_path / "good/step_5", MTJ_CONFIG).step == 5
    return tmp_path / "good/step_5"


DAMAGES = {
    "shard": (lambda f: shutil.rmtree(f / "shard_1"), r"shard_1 is missing"),
    "last shard": (lambda f: shutil.rmtree(f / "shard_3"), "each of 3 shards has .*: shard_3 to shard_3 are missing"),
    "all shards": (lambda f: [shutil.rmtree(f / f"shard_{s}") for s in range(4)], "no folders shard_0"),
    "piece": (lambda f: (f / "shard_2/7.npz").unlink(), r"shard_2/7\.npz is missing"),
    "truncated": (lambda f: os.truncate(f / "shard_0/3.npz", 999), r"shard_0/3\.npz: File is not a zip file"),
    "compressed": (
        lambda f: rewrite(f / "shard_0/3.npz", list, np.savez_compressed),
        r"^\S*shard_0/3\.npz: arr_0\.npy is compressed; save the arrays with np\.savez$",
    ),
    "pickled": (
        lambda f: rewrite(f / "shard_0/3.npz", lambda a: [np.array([{}]), *a[1:]]),
        r"^\S*shard_0/3\.npz: arr_0\.npy has the type object, whose values are pickled; save it as an array of numbers$",
    ),
    "fortran": (
        lambda f: rewrite(f / "shard_0/3.npz", lambda a: [np.ones((2, 2), order="F"), *a[1:]]),
        r"^\S*shard_0/3\.npz: arr_0\.npy is in Fortran order; save it in C order \(np\.ascontiguousarray\)$",
    ),
    "names": (lambda f: np.savez(f / "shard_0/3.npz", x=np.ones(2)), r"members are \['x\.npy'\]"),
    "uneven": (lambda f: rewrite(f / "shard_0/3.npz", lambda a: a[1:]), r"shard_0/3\.npz has 7 of the 126 leaves, but must have 8"),
    "shape": (lambda f: rewrite(f / "shard_1/0.npz", lambda a: [a[0][1:], *a[1:]]), r"shard_1 has shape \(15,\), expected \(16,"),
    "dtype": (lambda f: rewrite(f / "shard_1/0.npz", lambda a: [np.arange(16), *a[1:]]), "types float32, int64, but must all have"),
    "step": (lambda f: rewrite(f / "shard_1/15.npz", lambda a: [*a[:-1], np.array(6)]), r"step differs.*\[5, 6, 5, 5\]"),
    "step dtype": (lambda f: rewrite(f / "shard_1/15.npz", lambda a: [*a[:-1], np.ones(3)]), r"step of shard_1 is float64\[3\]"),
    "several": (
        lambda f: [(f / "shard_2/7.npz").unlink(), os.truncate(f / "shard_0/3.npz", 999), shutil.rmtree(f / "shard_1")],
        r"(?s)shard_1 is missing.*shard_0/3\.npz: .*shard_2/7\.npz is missing",
    ),
    "v2": (lambda f: (f / "params").mkdir(), 'format "v2"'),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name, good):
    damage, words = DAMAGES[name]
    damage(good)
    with pytest.raises(CheckpointError, match=words):
        open_gptj(good, MTJ_CONFIG)


OTHER_MODELS = [
    ({"layers": 11}, "the leaves of 12 layers, but old.json has layers = 11"),
    ({"layers": 13}, "the leaves of 12 layers, but old.json has layers = 13"),
    ({"pe": "t5"}, "each shard has 127 leaves, which is not the number of any model"),
    ({"n_vocab": 32}, r"missing, or n_vocab|shape \(6, 16\), expected \(8, 16\)"),
    ({"d_model": 32}, r"linear_3/w \(leaf 5\) of shard_2 has shape \(4, 16\), expected \(8, 32\)"),
    ({"n_heads": 2}, "n_heads = 2 is not a multiple of 4 shards"),
    ({"norm": "rmsnorm"}, "each shard has 127 leaves, which is not the number of any model"),
    ({"norm": "scalenorm-bias"}, r"layer_0/rms_norm/offset \(leaf 10\) of shard_0 has shape \(16,\), expected \(\)"),
    ({"norm": "layernorm-desync"}, "each shard has its own norm"),
    ({"d_model": None}, r"^old\.json cannot be imported:\n  d_model = null is not a positive integer$"),
    ({"norm": "?", "pe": "none", "seq": "8"}, r'(?s)seq = "8".*norm = "\?" is unknown.*pe = "none" is unknown'),
]


@pytest.mark.parametrize(("changes", "words"), OTHER_MODELS, ids=str)
def test_config_of_another_model_is_refused(changes, words, good):
    with pytest.raises(CheckpointError, match=words):
        open_gptj(good, MTJ_CONFIG | changes, "old.json")


UNSUPPORTED = (
    r'(?s)norm = "rmsnorm".*n_kv_heads = 2, but must be 4.*rope_theta = 500000.*gated_ffn = true, but must be false'
)


def test_unsupported_models_are_refused(tmp_path):
    good = make_model_config(read_model(MTJ_CONFIG), "test")
    gated = dataclasses.replace(good, gated_ffn=True, norm="rmsnorm", n_kv_heads=2, rope_theta=5e5)
    for config, shards, dtype, words in (
        (
            gated,
            1,
            "float32",
            UNSUPPORTED,
        ),
        (good, 8, "float32", "n_heads = 4 is not a multiple of 8 shards"),
        (good, 1, "int8", "dtype 'int8'"),
        (good, 1, "float32", "(?s)b_head is missing.*w_head is missing"),
    ):
        with pytest.raises(CheckpointError, match=words):
            write_gptj(tmp_path / "new", make_plan(config, {}, 5), shards=shards, dtype=dtype)
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True, kw_only=True)
class FutureConfig(ModelConfig):
    """A model configuration with a field that the writer does not know."""

    logit_softcap: float | None = None


def test_unknown_fields_of_a_model_are_refused(monkeypatch):
    monkeypatch.setattr(writer, "make_model_config", lambda model, where: FutureConfig(**model))
    model = read_model(MTJ_CONFIG)
    assert make_external_config(FutureConfig(**model), 1) == make_external_config(ModelConfig(**model), 1)
    with pytest.raises(CheckpointError, match=r"logit_softcap = 30\.0, but must be unset"):
        make_external_config(FutureConfig(**model, logit_softcap=30.0), 1)


def test_failed_write_resumes(tmp_path):
    config = make_model_config(read_model(MTJ_CONFIG), "test")
    arrays = make_random_arrays(config)
    arrays["params/transformer/norm_out/scale"].values[3] = 1e6
    with pytest.raises(
        CheckpointError,
        match=r"projection_shard.*/scale: the value 1e\+06 is too large for float16",
    ):
        write_gptj(tmp_path, make_plan(config, arrays, 6), shards=2, dtype="float16")
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(CheckpointError, match=r"shard_0/15\.npz is missing"):
        open_gptj(tmp_path / "step_6", MTJ_CONFIG)
    arrays["params/transformer/norm_out/scale"].values[3] = 1e4
    first = tmp_path / "step_6/shard_0/0.npz"
    stamp, progress = first.stat().st_mtime_ns, []

    def report(stage: str, done: int, total: int) -> None:
        progress.append((done, total))

    write_gptj(tmp_path, make_plan(config, arrays, 6), shards=2, dtype="float16", progress=report)
    assert first.stat().st_mtime_ns == stamp
    assert progress[-1][0] == progress[-1][1]
    found = read_all(open_gptj(tmp_path / "step_6", MTJ_CONFIG))
    assert_same(found, {name: array.values.astype(np.float16) for name, array in arrays.items()})
