# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a run needs on hardware that need not be there: its very programs compiled for it, before anything is paid for.

examples:
  python device_plan.py configs/gptj_finetune.toml --topology v3-8
      memory by kind and whether it fits (if not, the smallest change that does), traffic, step time, MFU, days, disk
  python device_plan.py configs/gpt3_175b.toml --topology 128x8xH100 --tokens 300B --price-per-chip-hour 2.5 --json
      the same for 1,024 GPUs as one JSON object, with energy and money
  python device_plan.py configs/gptj_6b.toml --topology v5e-8 --search --picture frontier.svg
      the best mesh, remat and microbatches: all by formula, the best few compiled
  python device_plan.py configs/gptj_6b.toml --topology v5e-8 --sample --batch 8 --context 2048
      the decoding program: weights, cache, tokens/s at most
"""

import sys

from mesh_transformer.cli import add_set_option, make_parser, run_command
from mesh_transformer.config import load_config


def main(arguments: list[str]) -> int:
    """Parse, plan, print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, such as configs/quickstart.toml")
    add_set_option(parser)
    parser.add_argument(
        "--topology",
        default="local",
        metavar="NAME",
        help="v3-8, v4-2048, v5p-1024, v6e-256, 2xv5e-256, H100, 8xH100, 128x8xH100, 8xA100-40, cpu-8, or local; "
        "default: %(default)s, the devices of this machine",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--parameters", action="store_true", help="list every parameter and where it lies")
    parser.add_argument("--fast", action="store_true", help="least compiler effort: quicker, memory approximate (TPU)")
    parser.add_argument("--tokens", metavar="N", help="budget, such as 300B; default: the run's own steps")
    parser.add_argument("--price-per-chip-hour", type=float, metavar="X", help="for what the run costs")
    parser.add_argument("--sample", action="store_true", help="plan decoding instead of training")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="with --sample: rows; default: %(default)s")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="with --sample: tokens of a row, with an encoder so many read and so many written; default: seq_len",
    )
    parser.add_argument(
        "--search", type=int, nargs="?", const=4, metavar="N", help="find the best mesh, compiling N (4 if not given)"
    )
    parser.add_argument("--picture", metavar="FILE", help="with --search: write the frontier as SVG")
    parser.add_argument("--cache", metavar="FOLDER", help="keep what was compiled, and take it from there")
    options = parser.parse_args(arguments)

    from mesh_transformer.plan.run import run_plan

    run_plan(load_config(options.config, options.set), options)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
