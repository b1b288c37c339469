# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Corpus building: raw sources to a filtered, deduplicated, mixed, tokenized and documented corpus, from one TOML file.

- `recipe`: schema of the TOML file.
- `sources`: finds the files of a component and extracts documents; `markup` and `latex` convert markup to text.
  A new kind of source is one row in `sources`.
- `filters`: per-document filters and edits. A new filter is one function here and one record in `recipe`.
- `stage_filter`, `stage_dedup`, `stage_select`, `stage_mix`: the stages, in the order in which `build` runs them.
- `stages`, `executors`: run a stage in parts on this machine, Slurm or Ray; a missing part is an error.
- `survey`, `datasheet`: measurements and documentation of the result.
- `renamed`: keys of version 1.0 and their current names.
"""

import importlib.util

if importlib.util.find_spec("datatrove") is None:
    raise ImportError("mesh_transformer.corpus requires additional libraries: pip install 'mesh-transformer[corpus]'")
