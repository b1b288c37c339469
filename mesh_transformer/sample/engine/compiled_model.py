# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A model bound to its weights and its mesh, and programs of it, jitted and counted: what every engine begins with."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import MeshLayout, constrain, use_layout
from mesh_transformer.model.transformer import init_cache, make_model
from mesh_transformer.sample.engine.weights import choose_compiler_options, prepare_weights, unstack_layers


class CompiledModel:
    """One model as sampling runs it; of weights given as shapes, programs can only be lowered."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Mapping[str, Any]],
        layout: MeshLayout | None,
        *,
        weights: str = "saved",
        cache: str = "model",
    ):
        """See Engine. Raises ConfigError for a mesh that cuts what is drawn one token at a time."""
        if layout and (layout.mesh.shape["context"] > 1 or layout.mesh.shape["pipeline"] > 1):
            raise ConfigError(
                "sampling one token at a time cuts neither sequences nor layers: set mesh.context and mesh.pipeline to 1"
            )
        # All layers in one piece; a sequence of one token cannot be cut, and nothing is differentiated.
        unroll = max(config.n_layers, config.n_encoder_layers or 0)
        self.config = dataclasses.replace(config, scan_unroll=unroll, remat="none", dropout=0.0)
        self.layout = layout and layout._replace(rules={**layout.rules, "sequence": (), "activation_seq": ()})
        self.compilations: Counter[str] = Counter()
        self.weights = prepare_weights(params, self.config, self.layout, weights)
        self._cache_dtype = None if cache == "model" else cache
        self._model = make_model(self.config)
        with use_layout(self.layout):
            self._compiler_options = choose_compiler_options(self.weights, self.config)

    def _program(self, name: str, function: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.compilations[name] += 1
            with use_layout(self.layout):
                return function(*arguments)

        return jax.jit(counted, compiler_options=self._compiler_options, **jit_options)

    def _empty_caches(self, rows: int, cache_len: int, source_len: int = 0) -> Any:
        caches = init_cache(self.config, rows, cache_len, self._cache_dtype, source_len=source_len)
        return constrain_caches(unstack_layers(caches))


def constrain_caches(caches: Any) -> Any:
    """Caches of single layers, each array [B, K, S, C], where the rules want them."""
    return jax.tree.map(lambda x: constrain(x, "batch", "kv_heads", "position", "head_dim"), caches)
