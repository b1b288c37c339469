# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Documents -> tokens -> shards -> batch(step).

`readers` finds the files of a source and gives their documents, whatever they are packed in (`formats`, `archives`);
what is damaged stops the run or is counted, with file and line (`documents`). `tokenizers` turns text into ids and ids
back into text. `shards` keeps the ids of all documents in two memory-mapped files, once for all runs. `loader` cuts
them into sequences and mixes sources, so that a batch is a pure function of data, seed and step.
"""
