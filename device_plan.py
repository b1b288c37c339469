# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Plan a run on hardware that need not be present: compile its programs for it, and print memory, step time and cost.

examples:
  python device_plan.py configs/gptj_finetune.toml --topology v3-8
      memory by kind and whether it fits (if not, the smallest change that fits), traffic, step time, MFU, days, disk
  python device_plan.py configs/gpt3_175b.toml --topology 128x8xH100 --tokens 300B --price-per-chip-hour 2.5 --json
      the same for 1,024 GPUs as one JSON object, with energy and cost
  python device_plan.py configs/gptj_6b.toml --topology v5e-8 --search --plot frontier.svg
      the best mesh, remat and microbatches: all are estimated, the best few compiled
  python device_plan.py configs/gptj_6b.toml --topology v5e-8 --decode --batch 8 --context 2048
      the decoding program: weights, KV cache, maximum tokens/s
  python device_plan.py meta-llama/Llama-3.1-8B --topology H100 --decode --batch 16 --context 4096
      the same for a model of any format that device_sample.py accepts; only its configuration is read, not its weights
"""

import sys
from pathlib import Path

from mesh_transformer.cli import add_set_option, make_parser, run_command
from mesh_transformer.config import Config, ConfigError, find_config, load_config


def main(arguments: list[str]) -> int:
    """Plan the run named on the command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a TOML file, such as configs/quickstart.toml; with --decode also a run folder, checkpoint, Hugging Face folder or "
        "name (org/model), or .gguf file",
    )
    add_set_option(parser)
    parser.add_argument(
        "--topology",
        default="local",
        metavar="NAME",
        help="hardware: v3-8, v4-2048, v5p-1024, v6e-256, 2xv5e-256, H100, 8xH100, 128x8xH100, 8xA100-40, cpu-8, or local; "
        "default: %(default)s, the devices of this machine",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--parameters", action="store_true", help="list every parameter and its sharding")
    parser.add_argument(
        "--low-effort",
        action="store_true",
        help="lowest compiler effort: faster, memory accurate to a few percent (TPU)",
    )
    parser.add_argument(
        "--tokens", metavar="N", help="tokens to train on, such as 300B; default: those of the run's steps"
    )
    parser.add_argument(
        "--price-per-chip-hour", type=float, metavar="X", help="print the cost of the run at this price"
    )
    parser.add_argument("--decode", action="store_true", help="plan decoding instead of training")
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="with --decode: number of sequences; default: %(default)s"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="with --decode: sequence length (encoder-decoder: source and target length); default: model.seq_len",
    )
    parser.add_argument(
        "--search",
        type=int,
        nargs="?",
        const=4,
        metavar="N",
        help="find the best mesh; compile N candidates (default 4)",
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="with --search: write the Pareto frontier as SVG")
    parser.add_argument("--cache", metavar="FOLDER", type=Path, help="cache compiled results in FOLDER")
    options = parser.parse_args(arguments)

    from mesh_transformer.plan.run import PlanOptions, parse_amount, run_plan

    plan_options = PlanOptions(
        topology=options.topology,
        title=Path(options.config).stem,
        low_effort=options.low_effort,
        tokens=parse_amount(options.tokens) if options.tokens else None,
        price_per_chip_hour=options.price_per_chip_hour,
        decode=options.decode,
        batch=options.batch,
        context=options.context,
        search=options.search,
        plot=options.plot,
        cache=options.cache,
        print_json=options.json,
        print_parameters=options.parameters,
    )
    run_plan(_load_config(options.config, options.set, decode=options.decode), plan_options)
    return 0


def _load_config(name: str, overrides: list[str], *, decode: bool) -> Config:
    """Return the configuration of a TOML file or, with `decode`, of a model of any format."""
    path = find_config(name)
    is_model = path.is_dir() or path.suffix == ".gguf" or (decode and not path.exists())
    if path.suffix == ".toml" or not is_model:
        return load_config(name, overrides)
    if not decode:
        raise ConfigError(
            f"{name}: to plan training, give a TOML file with its batch size, optimizer and mesh; to plan decoding with a "
            "model, add --decode"
        )
    from mesh_transformer.sample.loading import load_sampling_config

    return load_sampling_config(name, overrides)


if __name__ == "__main__":
    sys.exit(run_command(main))
