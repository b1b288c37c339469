# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Training data: documents -> tokens -> shards -> batches.

- `readers`, `formats`, `compression`, `tfrecords`: read documents from datasets and files. A damaged document stops
  the run or is skipped and counted, with file and line (`errors`).
- `tokenizers`, `tokenizer_files`, `vocabularies`: text <-> token ids.
- `shard_builder`, `shards`: memory-mapped token shards, built once and shared by all runs.
- `loader`, `span_corruption`: pack documents into sequences and mix datasets. A batch is a pure function of
  (data, seed, step).
- `dataset`: opens the tokenizer and datasets of a run. `download` copies datasets from object
  stores. `chat_template` renders chats.

To add a file format, add a row to `formats.READERS`. To add another kind of dataset, add a row to `readers.DATASETS`.
"""
