# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Generate text with a trained model: RUN -> text.

RUN is a run folder, a checkpoint in it, or a model of another format (a Hugging Face folder or name, a .gguf file, shards of
mesh-transformer-jax), which is converted once into ~/.cache/mesh-transformer/models.

examples:
  python device_sample.py runs/quickstart
      an interactive prompt; options start as in the run's [sample] section, and /help lists the commands
  python device_sample.py runs/quickstart --prompt "def main(" --n 3 --max-tokens 64 --stop "\\n\\n" --json
      three samples up to an empty line, one JSON object each: prompt, text, tokens, logprobs, finish
  python device_sample.py runs/large --speculative prompt-lookup
  python device_sample.py runs/large --set 'serve.speculative="draft-model"' --set 'serve.draft_model="runs/small"'
      speculative decoding: verify serve.num_speculative_tokens draft tokens (default: 4) in each forward pass; they come
      from earlier repetitions in the text, or from a smaller model with the same vocabulary. The tokens are those of
      plain decoding. --json adds `speculative`: draft_tokens and accepted_tokens. Decoder-only models only

A converted model uses the special tokens of its Hugging Face files, and samples with the defaults of its
generation_config.json, which --set sample.NAME=VALUE and flags override.

exit status: 0 done, 1 failed, 2 invalid usage or configuration
"""

import argparse
import json
import sys

from mesh_transformer.cli import add_set_option, make_parser, run_command
from mesh_transformer.config import ConfigError

FLAGS = {"max_tokens": int, "temperature": float, "top_k": int, "top_p": float}  # short for --set sample.NAME=VALUE
SPECIAL = {
    "add_special_tokens": "add to prompts the special tokens that a converted model's files add, such as <s>; the default",
    "parse_special": "special tokens written in a prompt, such as <|im_start|>, become their ids; default: they are text",
}


def main(arguments: list[str]) -> int:
    """Load the model, then generate for the prompts or run the interactive prompt."""
    options = parse(arguments)
    overrides = list(options.set)
    given = {name: value for name in (*FLAGS, *SPECIAL) if (value := getattr(options, name)) is not None}
    overrides += [f"sample.{name}={json.dumps(value)}" for name, value in given.items()]
    if options.speculative:
        overrides.append(f'serve.speculative="{options.speculative}"')
    # JAX is imported after parsing, so that --help and usage errors are fast.
    from mesh_transformer.sample.loading import load_model
    from mesh_transformer.sample.repl import Repl
    from mesh_transformer.sample.text_generation import complete_texts

    model = load_model(options.run, overrides)
    config, defaults = model.config, model.defaults
    for line in defaults.describe():
        print(line, file=sys.stderr)
    if options.prompt is None:
        print(f"{model.where}: step {model.step}", file=sys.stderr)
        Repl(model.engine, defaults, config.sample, seed=options.seed, stops=options.stop).run()
        return 0
    completions = complete_texts(
        model.engine, defaults, options.prompt, config.sample, n=options.n, seed=options.seed, stops=options.stop
    )
    for number, completion in enumerate(completions):
        n_tokens = len(completion.tokens)
        if completion.finish == "length" and n_tokens < config.sample.max_tokens:
            text = f"note: stopped after {n_tokens} tokens, at the maximum length model.seq_len={config.model.seq_len}"
            print(text, file=sys.stderr)
        if options.json:
            print(completion.to_json())
        else:
            print("-" * 72 + "\n" if number else "", completion.prompt, completion.text, sep="")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line and validate values that do not depend on the model."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "run",
        metavar="RUN",
        help="run folder, checkpoint, Hugging Face folder or name (org/model), or .gguf file",
    )
    parser.add_argument("--prompt", action="append", help='text to continue; "" begins a document; repeatable')
    parser.add_argument("--n", type=int, default=1, help="samples per prompt; default: %(default)s")
    for name, kind in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"the same as --set sample.{name}=...")
    for name, text in SPECIAL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=text)
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal texts; default: %(default)s")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help=r"end before TEXT; \n is a new line; repeatable"
    )
    parser.add_argument(
        "--speculative",
        choices=("none", "prompt-lookup", "draft-model"),
        help="speculative decoding; the same as --set serve.speculative=...",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per sample")
    add_set_option(parser)
    options = parser.parse_args(arguments)
    if options.n < 1:
        raise ConfigError(f"--n {options.n}: must be at least 1")
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed}: must be at least 0")
    if options.prompt is None and (options.json or options.n != 1):
        raise ConfigError("--json and --n require --prompt; add --prompt TEXT")
    options.stop = [_unescape(stop) for stop in options.stop]
    return options


def _unescape(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


if __name__ == "__main__":
    sys.exit(run_command(main))
