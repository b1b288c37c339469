# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint conversion and resharding between native, Hugging Face and GPT-J v1 formats."""
