# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The Python library: load a model, compute logits, generate, train and reshard, from notebooks and scripts.

```python
import mesh_transformer as mt

model = mt.load_model("runs/quickstart")
print(model.generate("def ", max_tokens=40))
run_dir = mt.train_model("quickstart", ["train.steps=100"])
mt.reshard(run_dir, "out/model", format="huggingface")
```
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from mesh_transformer.config import Config, ConfigError, MeshConfig, load_config
from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.distributed.bootstrap import join_processes
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.evaluate.callback import make_measure
from mesh_transformer.mesh import MeshLayout, init_devices
from mesh_transformer.sample import loading
from mesh_transformer.sample.encoder import EncoderInputs, Texts, make_inputs, mean_pool
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.loading import LoadedEncoder, LoadedModel
from mesh_transformer.sample.text_generation import TextCompletion, TextGeneration
from mesh_transformer.train.session import train_config

SAMPLING = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "add_special_tokens",
    "parse_special",
)


class _OnDevices:
    """A model on devices, with the members that models for generation and encoders share."""

    def __init__(self, loaded: LoadedModel | LoadedEncoder) -> None:
        self._loaded = loaded

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._loaded.where!r}, step {self.step})"

    @property
    def config(self) -> Config:
        """The configuration, with the [mesh] section of `load_model`, and for generation also [sample] and [serve]."""
        return self._loaded.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the checkpoint stores: `encode(text)`, `decode(ids)`."""
        return self._loaded.tokenizer

    @property
    def step(self) -> int:
        """The training step of the checkpoint."""
        return self._loaded.step


class Model(_OnDevices):
    """A trained model on devices, for text generation and logits, as returned by `load_model`."""

    _loaded: LoadedModel

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
            min_p, repetition_penalty, presence_penalty, frequency_penalty, add_special_tokens, parse_special.

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
        """Generate text after one prompt and yield it as it is decoded; arguments as in `generate`.

        Closing the iterator, or an exception such as KeyboardInterrupt, ends the sample.
        """
        generation = self._start([prompt], 1, seed, stop, sampling)
        try:
            for _, text in generation:
                yield text
        finally:
            generation.interrupt()  # otherwise the engine would continue this sample during the next request

    def logits(self, prompt: str | Sequence[int]) -> np.ndarray:
        """Return the logits of the next token after each token of `prompt`, float32 [tokens, n_vocab].

        `prompt` is a text, which is encoded as in `generate`, or a list of token IDs. Raises PromptError for an empty or too
        long prompt, and ConfigError for an encoder-decoder model.
        """
        if isinstance(prompt, str):
            prompt = self._loaded.defaults.encode(prompt) if prompt else []
        engine = self._loaded.engine
        if not isinstance(engine, DecoderOnlyEngine):
            raise ConfigError(
                "Model.logits supports decoder-only models, but this is an encoder-decoder model; call "
                "mesh_transformer.model.transformer.make_model(config.model).apply with encoder and decoder tokens"
            )
        return engine.logits(list(prompt))

    def _start(
        self, prompts: Sequence[str], n: int, seed: int, stop: Sequence[str], sampling: dict[str, Any]
    ) -> TextGeneration:
        if unknown := sorted(set(sampling) - set(SAMPLING)):
            raise ConfigError(f"{unknown[0]} is not a sampling parameter; expected one of: {', '.join(SAMPLING)}")
        options = dataclasses.replace(self.config.sample, **sampling)
        loaded = self._loaded
        return TextGeneration(loaded.engine, loaded.defaults, prompts, options, n=n, seed=seed, stops=stop)


class Encoder(_OnDevices):
    """An encoder-only model (BERT, RoBERTa, ALBERT) on devices, as returned by `load_model`.

    Methods return the hidden states and the outputs of the heads. `texts` is one input or a batch: a text, a list of texts,
    a list of pairs of texts (text, text), the token IDs of one sequence, a list of such sequences, or the result of
    `tokenize`. A text gets the special tokens of the model's files, and special tokens written in it, such as [MASK], become
    their IDs. The sequences of a batch are padded to the longest one; the outputs of a text do not depend on the other texts.
    Outputs at padding have no meaning. A sequence that is empty or longer than model.seq_len raises PromptError.
    """

    _loaded: LoadedEncoder

    def tokenize(self, texts: Texts | EncoderInputs) -> EncoderInputs:
        """Return the batch that the model reads: `tokens`, `attention_mask` and `token_types`, int32 [batch, seq_len]."""
        return make_inputs(texts, self.tokenizer, self.config.model)

    def hidden_states(self, texts: Texts | EncoderInputs) -> np.ndarray:
        """Return the hidden states after the last layer, float32 [batch, seq_len, d_model]."""
        return self._loaded.programs.hidden_states(self.tokenize(texts))

    def mean_pooled(self, texts: Texts | EncoderInputs, *, normalize: bool = True) -> np.ndarray:
        """Return the mean of each text's hidden states, padding excluded, float32 [batch, d_model].

        The mean is divided by its L2 norm unless `normalize` is false. Normalized means are the sentence embeddings of
        all-MiniLM and other models of sentence-transformers with mean pooling (Reimers and Gurevych 2019, section 3). The
        dot product of two normalized means is the cosine similarity of the texts.
        """
        inputs = self.tokenize(texts)
        return mean_pool(self._loaded.programs.hidden_states(inputs), inputs.attention_mask, normalize=normalize)

    def pooled(self, texts: Texts | EncoderInputs) -> np.ndarray:
        """Return the output of the pooler, float32 [batch, d_model]. Raises ConfigError if the model has no pooler."""
        return self._loaded.programs.pooled(self.tokenize(texts))

    def logits(self, texts: Texts | EncoderInputs) -> np.ndarray:
        """Return the logits of the masked language-model head, float32 [batch, seq_len, n_vocab].

        Raises ConfigError if the model has no such head.
        """
        return self._loaded.programs.logits(self.tokenize(texts))

    def class_logits(self, texts: Texts | EncoderInputs) -> np.ndarray:
        """Return the logits of the sequence classifier, float32 [batch, n_labels].

        Raises ConfigError if the model has no classifier.
        """
        return self._loaded.programs.class_logits(self.tokenize(texts))

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Raise ConfigError: an encoder does not generate text."""
        raise ConfigError(
            f"{self._loaded.where} is an encoder (model.causal=false), which cannot generate text; use hidden_states, "
            "mean_pooled, pooled, logits or class_logits, or load a model that generates, such as GPT-2"
        )

    stream = generate


def load_model(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Model | Encoder:
    """Load a trained model onto devices: a `Model`, or an `Encoder` if the model is encoder-only.

    Args:
      path: a run folder (its latest valid checkpoint), a checkpoint folder, or a Hugging Face model folder; also s3:// and
        gs:// paths.
      overrides: fields as after --set on the command line, such as "mesh.tensor=4", 'serve.weight_dtype="int8"' or
        "sample.temperature=0.0". By default the model is on one device.

    Raises:
      ConfigError: an override that would change the model, or a mesh that does not fit.
      CheckpointError: no checkpoint, or a damaged one.
    """
    loaded = loading.load_any_model(os.fspath(path), overrides)
    return Encoder(loaded) if isinstance(loaded, LoadedEncoder) else Model(loaded)


def make_mesh(**axes: Any) -> MeshLayout:
    """Return a mesh of all devices with the given axis sizes, and the default sharding rules.

    `make_mesh(fsdp=4, tensor=2)` uses all remaining devices as replicas (`data=-1`). `cpu_devices=8` splits the CPU into
    eight devices, if JAX has not been used before. Use the result as `with mesh_transformer.mesh.use_layout(layout):`.
    Raises ConfigError if the sizes do not fit the number of devices.
    """
    return init_devices(MeshConfig(**axes))


def train_model(
    config: str | os.PathLike[str] | Config, overrides: Iterable[str] = (), *, restart: bool = False
) -> str:
    """Train or resume a run, and return its run folder.

    Args:
      config: a TOML file, the name of a shipped configuration ("quickstart"), or a `Config`.
      overrides: fields as after --set on the command line, such as "train.steps=100"; only with a file.
      restart: start over; an existing run folder is kept under another name.

    Raises:
      ConfigError: an invalid configuration, or a run folder of another run.
      Preempted: a stop was requested (Ctrl-C, SIGTERM); the run is saved and resumes with the same call.
    """
    if isinstance(config, Config):
        if given := list(overrides):
            raise ConfigError(
                f"overrides={given} need a configuration file, but `config` is a Config; change it with dataclasses.replace"
            )
    else:
        config = load_config(Path(config), overrides)
    with StopRequest() as stop, join_processes(config.mesh):
        layout = init_devices(config.mesh)
        return str(train_config(config, layout, stop, restart=restart, measure=make_measure(config)))


def reshard(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    format: Literal["native", "huggingface", "gptj-v1"] = "native",
    **options: Any,
) -> dict[str, Any]:
    """Convert a checkpoint to another format or dtype in bounded memory, verify the result, and return the report.

    Args:
      source: a run, a checkpoint, a Hugging Face model folder, or shards of mesh-transformer-jax (detected).
      destination: the folder to create.
      format: "native", "huggingface" or "gptj-v1".
      **options: fields of `mesh_transformer.convert.conversion.ConversionOptions`: dtype, weights_only, max_memory,
        tokenizer, source_config, shards, overwrite, staging.

    Raises:
      CheckpointError: the source is damaged or not supported, or the result differs from the source.
      ConfigError: invalid options.
    """
    known = {field.name for field in dataclasses.fields(ConversionOptions)}
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"{unknown[0]} is not an option of reshard; expected one of: {', '.join(sorted(known))}")
    return convert(
        ConversionOptions(source=os.fspath(source), destination=os.fspath(destination), format=format, **options)
    )
