# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Training data: documents -> tokens -> shards -> batches.

- `readers`, `formats`, `compression`: read documents from files; a damaged document stops the run or is counted,
  with file and line (`errors`).
- `tokenizers`: text <-> token ids.
- `shard_builder`, `shards`: memory-mapped token shards, built once and shared by all runs.
- `loader`: packs documents into sequences and mixes datasets; a batch is a pure function of (data, seed, step).
"""
