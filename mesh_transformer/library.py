# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The Python library: load a model, compute logits, generate, train and reshard, from notebooks and scripts.

    import mesh_transformer as mt

    model = mt.load_model("runs/quickstart")
    print(model.generate("def ", max_tokens=40))
    run_dir = mt.train("quickstart", ["train.steps=100"])
    mt.reshard(run_dir, "out/model", format="huggingface")
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config import Config, ConfigError, MeshConfig, load_config
from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.distributed.bootstrap import join_processes
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.evaluate.callback import make_measure
from mesh_transformer.evaluate.checkpoint_eval import open_model
from mesh_transformer.mesh import MeshLayout, init_devices
from mesh_transformer.sample.engine.decoder_only import require_decoder_only
from mesh_transformer.sample.loading import LoadedModel
from mesh_transformer.sample.text_generation import TextCompletion, TextGeneration
from mesh_transformer.train.session import train_config

SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class Model:
    """A trained model on devices: text generation and logits. Made by `load_model`."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def __repr__(self) -> str:
        return f"Model({self._loaded.where!r}, step {self.step})"

    @property
    def config(self) -> Config:
        """The configuration of the run that trained the model, with today's [sample], [serve] and [mesh] sections."""
        return self._loaded.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the checkpoint stores: `encode(text)`, `decode(ids)`."""
        return self._loaded.tokenizer

    @property
    def step(self) -> int:
        """The training step of the checkpoint."""
        return self._loaded.step

    def generate(
        self, prompt: str | Sequence[str], *, n: int = 1, seed: int = 0, stop: Sequence[str] = (), **sampling: Any
    ) -> str | list[TextCompletion]:
        """Generate text after a prompt.

        Args:
          prompt: a prompt, or several that are processed as one batch.
          n: number of samples per prompt.
          seed: equal seeds give equal samples.
          stop: strings that end a sample; they are not part of it.
          **sampling: fields of the `[sample]` section that override the model's: max_tokens, temperature, top_k, top_p,
            min_p, repetition_penalty, presence_penalty, frequency_penalty.

        Returns:
          The generated text for one prompt with n=1; otherwise a list of completions (prompt, text, tokens, logprobs,
          finish), the n samples of a prompt in a row.

        Raises:
          PromptError: a prompt leaves no space in the context.
          ConfigError: an unknown sampling parameter or an invalid value.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        generation = self._start(prompts, n, seed, stop, sampling)
        for _ in generation:
            pass
        completions = generation.completions()
        return completions[0].text if isinstance(prompt, str) and n == 1 else completions

    def stream(self, prompt: str, *, seed: int = 0, stop: Sequence[str] = (), **sampling: Any) -> Iterator[str]:
        """Generate text after one prompt and yield it as it is decoded; arguments as in `generate`."""
        for _, text in self._start([prompt], 1, seed, stop, sampling):
            yield text

    def logits(self, prompt: str | Sequence[int]) -> np.ndarray:
        """Return the logits of the next token after each token of `prompt`, float32 [tokens, n_vocab].

        `prompt` is a text or a list of token ids. Encoder-decoder models are not supported.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if self.config.model.n_encoder_layers is not None:
            raise ConfigError("logits of an encoder-decoder model need encoder and decoder tokens; use mesh_transformer.model")
        if not ids:
            raise ConfigError("the prompt has no tokens; give at least one")
        return require_decoder_only(self._loaded.engine, "logits").logits(ids)

    def _start(
        self, prompts: Sequence[str], n: int, seed: int, stop: Sequence[str], sampling: dict[str, Any]
    ) -> TextGeneration:
        if unknown := sorted(set(sampling) - set(SAMPLING)):
            raise ConfigError(f"{unknown[0]} is not a sampling parameter; expected one of: {', '.join(SAMPLING)}")
        options = dataclasses.replace(self.config.sample, **sampling)
        loaded = self._loaded
        return TextGeneration(loaded.engine, loaded.tokenizer, prompts, options, n=n, seed=seed, stops=stop)
