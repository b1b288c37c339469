# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""mesh-transformer-jax's own format: its losses from its files, our files read back, and each way a file can be bad."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig, parse_config
from mesh_transformer.convert.gptj.reader import open_raw_weights, list_leaves, open_gptj, read_model, reader
from mesh_transformer.convert.gptj.writer import make_external_config, write_gptj
from mesh_transformer.convert.huggingface.reference import run_mtj
from mesh_transformer.convert.import_plan import ImportPlan, describe_weights, make_model_config
from mesh_transformer.convert.lazy_arrays import InMemory, full_index
from mesh_transformer.convert.logit_check import run_native
from mesh_transformer.model.positions import t5_buckets
from mesh_transformer.model.transformer import make_model
from mesh_transformer.train.state import describe_state, flatten_state

FIXTURE = Path(__file__).parents[4] / "shared" / "fixtures" / "gptj_v1_4shards"
needs_fixture = pytest.mark.skipif(
    not FIXTURE.exists(), reason="the original's fixtures are not on this machine (../shared/fixtures)"
)
ORIGINAL = json.loads((FIXTURE / "config.json").read_text()) if FIXTURE.exists() else {}
OLD = dict(layers=12, d_model=16, n_heads=4, n_vocab=24, norm="layernorm", pe="rotary", pe_rotary_dims=2, seq=8)


def read_all(foreign: ImportPlan) -> dict[str, np.ndarray]:
    return {name: array.read(full_index(array)) for name, array in foreign.arrays.items()}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape, name
        np.testing.assert_array_equal(a[name].astype(np.float32), b[name].astype(np.float32), err_msg=name)


def read_piece(path: Path) -> list[np.ndarray]:
    with np.load(path) as file:
        return [file[f"arr_{i}"] for i in range(len(file.files))]


def rewrite(path: Path, change, save=np.savez) -> None:
    save(path, *change(read_piece(path)))


def read_shard(folder: Path) -> list[np.ndarray]:
    return [leaf for piece in range(reader.PIECES) for leaf in read_piece(folder / f"{piece}.npz")]


@needs_fixture
@pytest.mark.parametrize("kind", ["full", "slim"])
def test_losses_equal_the_originals(kind):
    foreign = open_gptj(FIXTURE / kind / "step_1234", ORIGINAL)
    assert (foreign.step, foreign.tokenizer) == (1234, "gpt2")
    params: dict = {}
    for name, array in read_all(foreign).items():
        if name.startswith("params/"):
            module, leaf = name.removeprefix("params/").rsplit("/", 1)
            params.setdefault(module, {})[leaf] = jnp.asarray(array, jnp.float32)
    expected = np.load(FIXTURE / "expected.npz")
    tokens = jnp.asarray(expected["tokens"], jnp.int32)
    config = make_model_config(foreign.model, "test")
    logits, _ = jax.jit(make_model(config).apply)(params, tokens[:, :-1])
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    wanted = expected[f"{kind}_token_loss"]
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(losses, wanted, atol=1e-5, rtol=0)
    correct = np.argmax(logits, axis=-1) == tokens[:, 1:]
    np.testing.assert_array_equal(correct, expected[f"{kind}_correct"])


@needs_fixture
def test_resharded_files_hold_the_same_bits(tmp_path):
    foreign = open_gptj(FIXTURE / "full/step_1234", ORIGINAL)
    config = make_model_config(foreign.model, "test")
    weights = {name: array for name, array in read_all(foreign).items() if name.startswith("params/")}
    for shards in (1, 2, 8):
        write_gptj(tmp_path / f"{shards}", config, foreign.arrays, 77, shards=shards, dtype="float32")
        table = json.loads((tmp_path / f"{shards}" / "config.json").read_text())
        assert table["cores_per_replica"] == shards
        again = open_gptj(tmp_path / f"{shards}" / "step_77", table)
        assert again.step == 77
        assert again.model == foreign.model
        assert_same(read_all(again), weights)


@needs_fixture
def test_bfloat16_survives_a_round_trip(tmp_path):
    foreign = open_gptj(FIXTURE / "slim/step_1234", ORIGINAL)
    config = make_model_config(foreign.model, "test")
    write_gptj(tmp_path / "new", config, foreign.arrays, 1234, shards=4)
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in read_all(foreign).items()}
    assert_same(read_all(open_gptj(tmp_path / "new/step_1234", ORIGINAL)), rounded)
    # What was neither folded nor summed nor only one shard's is the original's, byte for byte and in its place.
    theirs, ours = read_shard(FIXTURE / "slim/step_1234/shard_3"), read_shard(tmp_path / "new/step_1234/shard_3")
    slots = list_leaves(config)
    places = [i for i, slot in enumerate(slots) if slot.layer is not None and isinstance(slot.entry.merge, int)]
    assert len(places) == 12 * 7
    for place in places:
        assert ours[place].dtype.str == theirs[place].dtype.str == "|V2"
        assert ours[place].tobytes() == theirs[place].tobytes(), slots[place].name


@needs_fixture
def test_slim_shards_are_recut_as_the_program_does_it(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts"))
    import reshard_checkpoint

    source, settings = str(FIXTURE / "slim/step_1234"), str(FIXTURE / "config.json")
    kinds = {}
    for name, dtype in (("exact", []), ("narrow", ["--dtype", "bfloat16"])):
        arguments = [source, str(tmp_path / name), "--source-config", settings, "--format", "gptj-v1", "--shards", "2"]
        assert reshard_checkpoint.main([*arguments, *dtype, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["dtype"] == ("bfloat16" if dtype else "float32")
        assert 0 < report["max_logit_difference"] < (0.1 if dtype else 1e-5)
        kinds[name] = {leaf.dtype.str for leaf in read_piece(tmp_path / name / "step_1234/shard_1/3.npz")}
        assert json.loads((tmp_path / name / "config.json").read_text())["cores_per_replica"] == 2
    assert kinds == {"exact": {"<f4"}, "narrow": {"|V2"}}
    assert (
        reshard_checkpoint.main([source, str(tmp_path / "hf"), "--source-config", settings, "--format", "huggingface"])
        == 0
    )
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "float32"


@needs_fixture
def test_adams_state_comes_under_the_names_of_a_run():
    foreign = open_gptj(FIXTURE / "full/step_1234", ORIGINAL)
    sections = dict(data={"train": {"a": {"path": "x"}}}, train={"steps": 10, "batch_size": 4})
    run = parse_config({"model": foreign.model, "optimizer": {"name": "adamw"}, **sections}, where="test")
    state = flatten_state(describe_state(run)[0])
    expected = {name: leaf for name, leaf in state.items() if name.startswith(("params/", "opt_state/"))}
    assert {name: array.shape for name, array in foreign.arrays.items()} == {k: v.shape for k, v in expected.items()}
    for name in (reader.OPT_COUNT, reader.SCHEDULE_COUNT):
        assert foreign.arrays[name].dtype == expected[name].dtype
        assert foreign.arrays[name].read(()) == 1234
    shards = [read_shard(FIXTURE / f"full/step_1234/shard_{s}") for s in range(4)]
    slots = [slot.name for slot in list_leaves(run.model)]
    for start, prefix in ((1, reader.OPT_MU), (1 + len(slots), reader.OPT_NU)):
        block = f"{prefix}transformer/layers/block_0/"
        # Layer 2 is after layer 11; head 5 of 8 is the second one of shard 2.
        found = foreign.arrays[block + "attention/w_v"].read((slice(2, 3), slice(0, 64), slice(5, 6), slice(0, 8)))
        place = start + slots.index("layer_2/linear_1/w")
        np.testing.assert_array_equal(found[0, :, 0], shards[2][place][:, 8:16])
        found = foreign.arrays[block + "feed_forward/b_out"].read((slice(10, 11), slice(0, 64)))[0]
        np.testing.assert_array_equal(found, shards[0][start + slots.index("layer_10/linear_5/b")])
        found = foreign.arrays[f"{prefix}transformer/w_tokens"].read((slice(45, 46), slice(0, 64)))[0]
        np.testing.assert_array_equal(found, shards[1][start + 1][5])


def make_arrays(config: ModelConfig) -> dict[str, InMemory]:
    rng = np.random.default_rng(0)
    shapes = {}
    for name, leaves in describe_weights(config).items():
        shapes[name] = leaves[0].shape if leaves[0].layer is None else (len(leaves), *leaves[0].shape)
    return {name: InMemory(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}


OTHERS = [
    {}, {"pe": "fixed"}, {"pe": "t5"}, {"pe_rotary_dims": 64}, {"layers": 1}, {"norm": "layernorm-nobias"},
    {"norm": "rmsnorm"}, {"norm": "rmsnorm-bias"}, {"norm": "scalenorm"}, {"norm": "scalenorm-bias", "pe": "t5"},
]  # fmt: skip


@pytest.mark.parametrize("changes", OTHERS, ids=str)
@pytest.mark.parametrize("shards", [1, 4])
def test_what_is_written_is_read_back(changes, shards, tmp_path):
    old = OLD | changes
    config = make_model_config(read_model(old), "test")
    arrays, seen = make_arrays(config), []
    options: dict = dict(shards=shards, dtype="float32", report=lambda *amounts: seen.append(amounts))
    write_gptj(tmp_path / "new", config, arrays, 5, **options)
    assert seen == sorted(seen)
    assert seen[-1] == (seen[0][1], seen[0][1])
    foreign = open_gptj(tmp_path / "new/step_5", make_external_config(config, shards))
    assert foreign.model == read_model(old)
    assert_same(read_all(foreign), {name: array.values for name, array in arrays.items()})


@pytest.mark.parametrize("norm", reader.NORMS)
def test_ours_computes_what_the_shards_do_whatever_the_norm(norm, tmp_path):
    old = OLD | {"norm": norm, "layers": 2}
    config = make_model_config(read_model(old), "test")
    write_gptj(tmp_path / "new", config, make_arrays(config), 5, shards=2, dtype="float32")
    folder = tmp_path / "new/step_5"
    if norm.startswith(("rmsnorm", "scalenorm")):  # the mean counts: let shards differ

        def differ(leaves):
            return [leaf * (3 if slot.entry.merge == "mean" else 1) for leaf, slot in leaves]

        slots, start = list_leaves(config), 0
        for piece in range(reader.PIECES):
            leaves = read_piece(folder / f"shard_1/{piece}.npz")
            own = slots[start : start + len(leaves)]
            rest = leaves[len(own) :]  # the step
            np.savez(folder / f"shard_1/{piece}.npz", *differ(zip(leaves, own, strict=False)), *rest)
            start += len(leaves)
    tokens = np.random.default_rng(1).integers(0, 24, (2, 8), dtype=np.int32)
    theirs = run_mtj(open_raw_weights(folder, old), old, tokens)
    ours = run_native(config, open_gptj(folder, old).arrays, tokens)
    assert np.std(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)


def test_t5_buckets_are_the_originals():
    distance = np.arange(4096)
    large = 16 + (np.log(np.maximum(distance, 1).astype(np.float32) / 16 + 1.2e-7) / np.log(8) * 16).astype(np.int32)
    wanted = np.where(distance < 16, distance, np.minimum(large, 31))
    np.testing.assert_array_equal(t5_buckets(jnp.asarray(distance)), wanted)


@pytest.fixture
def good(tmp_path) -> Path:
    config = make_model_config(read_model(OLD), "test")
    write_gptj(tmp_path / "good", config, make_arrays(config), 5, shards=4, dtype="float32")
    assert open_gptj(tmp_path / "good/step_5", OLD).step == 5
    return tmp_path / "good/step_5"


DAMAGES = {
    "shard": (lambda f: shutil.rmtree(f / "shard_1"), r"shard_1 is missing"),
    "last shard": (lambda f: shutil.rmtree(f / "shard_3"), r"6 rows of 24 in each of 3 shards: shard_3 to shard_3 are mis"),
    "all shards": (lambda f: [shutil.rmtree(f / f"shard_{s}") for s in range(4)], "no folders shard_0"),
    "piece": (lambda f: (f / "shard_2/7.npz").unlink(), r"shard_2/7\.npz is missing"),
    "truncated": (lambda f: os.truncate(f / "shard_0/3.npz", 999), r"shard_0/3\.npz: File is not a zip file"),
    "compressed": (lambda f: rewrite(f / "shard_0/3.npz", list, np.savez_compressed), r"arr_0\.npy is compressed"),
    "pickled": (lambda f: rewrite(f / "shard_0/3.npz", lambda a: [np.array([{}]), *a[1:]]), r"arr_0\.npy is pickled"),
    "fortran": (lambda f: rewrite(f / "shard_0/3.npz", lambda a: [np.ones((2, 2), order="F"), *a[1:]]), "in Fortran order"),
    "names": (lambda f: np.savez(f / "shard_0/3.npz", x=np.ones(2)), r"members are \['x\.npy'\]"),
    "uneven": (lambda f: rewrite(f / "shard_0/3.npz", lambda a: a[1:]), "126 leaves are not cut evenly, at 3.npz"),
    "shape": (lambda f: rewrite(f / "shard_1/0.npz", lambda a: [a[0][1:], *a[1:]]), r"of shard_1 has shape \(15,\), not \(16,"),
    "dtype": (lambda f: rewrite(f / "shard_1/0.npz", lambda a: [np.arange(16), *a[1:]]), "type float32, int64; they must be"),
    "step": (lambda f: rewrite(f / "shard_1/15.npz", lambda a: [*a[:-1], np.array(6)]), r"step differs.*\[5, 6, 5, 5\]"),
    "step dtype": (lambda f: rewrite(f / "shard_1/15.npz", lambda a: [*a[:-1], np.ones(3)]), "step is not an integer"),
    "all that is wrong": (
        lambda f: [(f / "shard_2/7.npz").unlink(), os.truncate(f / "shard_0/3.npz", 999), shutil.rmtree(f / "shard_1")],
        r"(?s)shard_1 is missing.*shard_0/3\.npz: .*shard_2/7\.npz is missing",
    ),
    "v2": (lambda f: (f / "params").mkdir(), 'format "v2"'),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_and_named(name, good):
    damage, words = DAMAGES[name]
    damage(good)
    with pytest.raises(CheckpointError, match=words):
        open_gptj(good, OLD)


OTHER_MODELS = [
    ({"layers": 11}, "holds 12 layers, old.json says 11"),
    ({"layers": 13}, "holds 12 layers, old.json says 13"),
    ({"pe": "t5"}, "127 leaves in each shard are no whole number of layers"),
    ({"n_vocab": 32}, r"missing, or n_vocab|shape \(6, 16\), not \(8, 16\)"),
    ({"d_model": 32}, r"linear_3/w \(leaf 5\) of shard_2 has shape \(4, 16\), not \(8, 32\)"),
    ({"n_heads": 2}, "n_heads = 2 is not a multiple of 4 shards"),
    ({"norm": "rmsnorm"}, "127 leaves in each shard are no whole number of layers"),
    ({"norm": "scalenorm-bias"}, r"layer_0/rms_norm/offset \(leaf 10\) of shard_0 has shape \(16,\), not \(\)"),
    ({"norm": "layernorm-desync"}, "another norm in each shard"),
    ({"d_model": None}, r"^old\.json is not .*:\n  d_model = None is not a positive integer$"),
    ({"norm": "?", "pe": "none", "seq": "8"}, r"(?s)seq = '8'.*norm = '\?' is unknown.*pe = 'none' is unknown"),
]


@pytest.mark.parametrize(("changes", "words"), OTHER_MODELS, ids=str)
def test_a_configuration_of_another_model_is_refused(changes, words, good):
    with pytest.raises(CheckpointError, match=words):
        open_gptj(good, OLD | changes, "old.json")


def test_models_that_the_format_cannot_hold_are_refused(tmp_path):
    good = make_model_config(read_model(OLD), "test")
    gated = dataclasses.replace(good, gated_ffn=True, norm="rmsnorm", n_kv_heads=2, rope_theta=5e5)
    for config, shards, dtype, words in (
        (gated, 1, "float32", r"(?s)gated = True.*kv_heads = 2, not 4.*rope_theta.*norm = 'rmsnorm'"),
        (good, 8, "float32", "n_heads = 4 is not a multiple of 8 shards"),
        (good, 1, "int8", "dtype 'int8'"),
        (good, 1, "float32", "(?s)b_head is missing.*w_head is missing"),
    ):
        with pytest.raises(CheckpointError, match=words):
            write_gptj(tmp_path / "new", config, {}, 5, shards=shards, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_a_write_that_failed_goes_on_with_the_pieces_it_lacks(tmp_path):
    config = make_model_config(read_model(OLD), "test")
    arrays = make_arrays(config)
    arrays["params/transformer/norm_out/scale"].values[3] = 1e6
    with pytest.raises(CheckpointError, match=r"projection_shard.*/scale: a value is too large for float16"):
        write_gptj(tmp_path, config, arrays, 6, shards=2, dtype="float16")
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(CheckpointError, match=r"shard_0/15\.npz is missing"):
        open_gptj(tmp_path / "step_6", OLD)
    arrays["params/transformer/norm_out/scale"].values[3] = 1e4
    first = tmp_path / "step_6/shard_0/0.npz"
    stamp, seen = first.stat().st_mtime_ns, []
    report = lambda *amounts: seen.append(amounts)  # noqa: E731
    write_gptj(tmp_path, config, arrays, 6, shards=2, dtype="float16", report=report)
    assert first.stat().st_mtime_ns == stamp
    assert seen[-1][0] == seen[-1][1]
    found = read_all(open_gptj(tmp_path / "step_6", OLD))
    assert_same(found, {name: array.values.astype(np.float16) for name, array in arrays.items()})
