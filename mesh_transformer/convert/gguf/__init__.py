# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""GGUF files, the format of llama.cpp: read and write weights, configuration, tokenizer and chat template."""
