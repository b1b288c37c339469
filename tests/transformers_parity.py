# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare one small random model of `transformers` with its conversion: logits, gradients, sampling, and the way back."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from reference_models import import_arrays, untie
from safetensors.numpy import load_file

from mesh_transformer.config import ModelConfig, SampleConfig
from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.convert.import_plan import PREFIX
from mesh_transformer.convert.lazy_arrays import full_index
from mesh_transformer.convert.readers import open_checkpoint
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.encoder_decoder import EncoderDecoderEngine

N_VOCAB, LENGTH = 61, 30
LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4  # of the largest logit; of the largest entry of the array


class Imported(NamedTuple):
    config: ModelConfig
    params: dict[str, dict[str, jax.Array]]


def save_random_model(kind: str, folder: Path, keys: dict[str, Any], *, own_head: bool = False) -> Any:
    """Save a model of a class of transformers with weights far from initial values, and return it.

    `own_head` unties the head of a class that does not do so by itself.
    """
    import torch
    import transformers

    transformers.set_seed(0)
    common: dict[str, Any] = dict(vocab_size=N_VOCAB, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    config = transformers.CONFIG_MAPPING[kind](**common | keys)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    if own_head:
        untie(model)
    return save_with_random_weights(model, folder)


def save_with_random_weights(model: Any, folder: Path) -> Any:
    """Give a model of transformers weights far from its initial values, save it, and return it."""
    import torch

    rng = np.random.default_rng(0)
    for name, weight in model.named_parameters():
        scale = 0.3 if weight.ndim == 1 else 1.3 * weight.shape[-1] ** -0.5
        values = rng.normal(size=weight.shape) * scale + (weight.ndim == 1 and name.endswith("weight"))
        weight.data = torch.tensor(values, dtype=torch.float32)
    model.eval().save_pretrained(folder)
    return model


def import_model(folder: Path, destination: Path) -> Imported:
    """Convert a model folder to a native checkpoint and read it."""
    convert(ConversionOptions(source=folder, destination=destination, verify="own"))
    plan = open_checkpoint(destination).plan
    params: dict[str, dict[str, jax.Array]] = {}
    for name, array in plan.values.items():
        module, _, leaf = name.removeprefix(PREFIX).rpartition("/")
        params.setdefault(module, {})[leaf] = jnp.asarray(array.read(full_index(array)))
    return Imported(plan.config, params)


def check_family(kind: str, tmp_path: Path, keys: dict[str, Any]) -> Imported:
    """Compare a random model with its conversion and with the conversion back; return the imported model."""
    import torch
    import transformers

    source = tmp_path / "source"
    model = save_random_model(kind, source, keys)
    imported = import_model(source, tmp_path / "native")
    tokens = np.random.default_rng(1).integers(2, N_VOCAB, (2, LENGTH), dtype=np.int32)
    input_ids = torch.tensor(tokens, dtype=torch.long)
    logits = model(input_ids).logits
    wanted = logits.detach().numpy()
    assert np.std(wanted) > 0.1
    tolerance = LOGITS_TOLERANCE * max(np.abs(wanted).max(), 1.0)
    np.testing.assert_allclose(run(imported, tokens), wanted, atol=tolerance, rtol=0)
    check_gradients(kind, model, imported, tokens)
    check_sampling(model, imported, [tokens[0, :9], tokens[1, 3:20], tokens[1, :1]])
    back = tmp_path / "back"
    convert(ConversionOptions(source=tmp_path / "native", destination=back, format="huggingface", verify="own"))
    assert transformers.AutoConfig.from_pretrained(back).model_type == kind
    again = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    np.testing.assert_allclose(again(input_ids).logits.detach().numpy(), wanted, atol=1e-5, rtol=0)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)
    return imported


def check_encoder_decoder(kind: str, tmp_path: Path, keys: dict[str, Any], *, own_head: bool) -> Imported:
    """Compare a random encoder-decoder model with its conversion and with the conversion back; return the imported model."""
    import torch
    import transformers

    model = save_random_model(kind, tmp_path / "source", keys, own_head=own_head)
    imported = import_model(tmp_path / "source", tmp_path / "native")
    encoder_tokens, tokens = np.random.default_rng(1).integers(2, N_VOCAB, (2, 2, 3 * LENGTH), dtype=np.int32)
    inputs = dict(input_ids=torch.tensor(encoder_tokens), decoder_input_ids=torch.tensor(tokens))
    # in float64: with unscaled scores of these weights, the errors of float32 are as large as the tolerance on either side
    exact = copy.deepcopy(model).double()
    wanted = exact(**inputs).logits.detach().numpy()
    assert np.std(wanted) > 0.03
    apply = make_model(imported.config).apply
    found, _ = apply(imported.params, jnp.asarray(tokens), encoder_tokens=jnp.asarray(encoder_tokens))
    np.testing.assert_allclose(found, wanted, atol=LOGITS_TOLERANCE * max(np.abs(wanted).max(), 1.0), rtol=0)
    check_gradients(kind, exact, imported, tokens[:, :LENGTH], encoder_tokens[:, :LENGTH])
    check_encoder_decoder_sampling(model, imported, [encoder_tokens[0, :20], encoder_tokens[1, :7]])
    back = tmp_path / "back"
    convert(ConversionOptions(source=tmp_path / "native", destination=back, format="huggingface"))
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(back, dtype=torch.float32)
    expected = model(**inputs).logits.detach().numpy()
    np.testing.assert_allclose(again(**inputs).logits.detach().numpy(), expected, atol=1e-5, rtol=0)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "source", back))
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)
    return imported


def run(imported: Imported, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of the native model."""
    return np.asarray(make_model(imported.config).apply(imported.params, jnp.asarray(tokens))[0])


def check_gradients(
    kind: str, model: Any, imported: Imported, tokens: np.ndarray, encoder_tokens: np.ndarray | None = None
) -> None:
    """Compare the gradients of the mean loss with respect to every weight."""
    import torch

    encoder_inputs = {} if encoder_tokens is None else {"encoder_tokens": jnp.asarray(encoder_tokens)}

    def loss(params):
        apply = make_model(imported.config).apply
        log_p = jax.nn.log_softmax(apply(params, jnp.asarray(tokens[:, :-1]), **encoder_inputs)[0])
        return -jnp.mean(jnp.take_along_axis(log_p, jnp.asarray(tokens[:, 1:, None]), axis=-1))

    found = flatten_names(jax.grad(loss)(imported.params))
    model.zero_grad()
    inputs = {"input_ids" if encoder_tokens is None else "decoder_input_ids": torch.tensor(tokens[:, :-1])}
    inputs |= {} if encoder_tokens is None else {"input_ids": torch.tensor(encoder_tokens)}
    logits = model(**inputs).logits
    targets = torch.tensor(tokens[:, 1:], dtype=torch.long)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    grads = {name: weight.grad.numpy().astype(np.float32) for name, weight in model.named_parameters()}
    wanted = flatten_names(import_arrays(grads, kind, imported.config))
    assert found.keys() == wanted.keys()
    # A key's bias shifts all scores of a query equally, so its gradient is zero up to rounding.
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = largest if name.endswith("attention/b_k") else np.abs(gradient).max()
        assert scale > 0, f"{name} has no gradient"
        np.testing.assert_allclose(found[name], gradient, atol=GRADIENT_TOLERANCE * scale, rtol=0, err_msg=name)


def check_encoder_decoder_sampling(model: Any, imported: Imported, prompts: list[np.ndarray]) -> None:
    """Compare 12 greedy tokens for each input of the encoder; the engine adds the end token to an input."""
    import torch

    start, end = 0, 1
    model.generation_config.eos_token_id = None  # no sequence ends early
    options: dict[str, Any] = dict(do_sample=False, use_cache=False, max_new_tokens=12, decoder_start_token_id=start)
    texts = [torch.tensor([[*prompt.tolist(), end]]) for prompt in prompts]
    expected = [model.generate(text, **options)[0, 1:].tolist() for text in texts]
    engine = EncoderDecoderEngine(imported.config, imported.params, start_token=start, end_token=end)
    found = engine.generate([prompt.tolist() for prompt in prompts], SampleConfig(temperature=0.0, max_tokens=12))
    assert [completion.tokens for [completion] in found] == expected
    assert len({token for tokens in expected for token in tokens}) > 1, "the model should not repeat one token"


def check_sampling(model: Any, imported: Imported, prompts: list[np.ndarray]) -> None:
    """Compare 16 greedy tokens after each prompt, computed here by prefill and decode with a KV cache."""
    import torch

    options: dict[str, Any] = dict(do_sample=False, max_new_tokens=16, eos_token_id=None, pad_token_id=0)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    outputs = [model.generate(torch.tensor(p[None], dtype=torch.long), **options) for p in prompts]
    generated = [output.sequences[0, len(p) :].tolist() for output, p in zip(outputs, prompts, strict=True)]
    engine = DecoderOnlyEngine(imported.config, imported.params)
    found = engine.generate([p.tolist() for p in prompts], SampleConfig(temperature=0.0), max_tokens=16)
    assert [completion.tokens for [completion] in found] == generated
    for output, [completion] in zip(outputs, found, strict=True):
        # The logits of each step. A forward pass over the finished text gives others, because LongRoPE depends on its length.
        wanted = torch.cat(output.logits).log_softmax(-1)[range(16), completion.tokens]
        np.testing.assert_allclose(completion.logprobs, wanted.detach().numpy(), atol=1e-4)
    assert len({token for tokens in generated for token in tokens}) > 1, "the model should not repeat one token"
