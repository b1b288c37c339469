# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of two nodes builds the same bytes, and a failing part fails the build."""

import logging

import pytest
from invented_text import prose

pytest.importorskip("datatrove")
pytest.importorskip("ray")
import ray
from ray.cluster_utils import Cluster

from mesh_transformer.corpus.build import build_corpus
from mesh_transformer.corpus.stages import CorpusError, Executor

pytestmark = pytest.mark.filterwarnings("ignore")  # from Ray


@pytest.fixture
def cluster(monkeypatch):
    """Return the address of a cluster of two nodes with one CPU each, so that parallel parts run on different nodes."""
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    node = dict(num_cpus=1, memory=4 << 30, object_store_memory=100 << 20)
    nodes = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    nodes.add_node(**node)
    yield nodes.address
    ray.shutdown()
    nodes.shutdown()
    logging.getLogger("ray").handlers.clear()


def test_two_nodes(tmp_path, write_texts, make_recipe, cluster):
    components = {
        name: {"kind": "text", "paths": [str(write_texts(name, [prose(seed + i) for i in range(20)]))]}
        for name, seed in (("a", 0), ("b", 100))
    }
    recipe = make_recipe(components, duplicates={"near": "none"}, heldout={"one_in": 0})
    here = build_corpus(recipe, tmp_path / "here", Executor())
    there = build_corpus(recipe, tmp_path / "there", Executor(workers=2, ray=cluster))
    assert there.manifest == here.manifest
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2

    (tmp_path / "b" / "bad.txt").write_bytes(b"\xff")
    strict = make_recipe(components, duplicates={"near": "none"}, corpus={"on_bad_document": "error"})
    with pytest.raises(CorpusError, match=r"stage filter: 1 of 2 parts are incomplete \(1\); DataError: .*bad.txt"):
        build_corpus(strict, tmp_path / "there", Executor(workers=2, ray=cluster))
    assert not (tmp_path / "there" / "manifest.json").exists()
