# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Run scripts/bench/train.py."""

import sys

from mesh_transformer.scripts.bench.train import main

from mesh_transformer.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
