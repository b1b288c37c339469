# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints: tensor files, config and tensor-name tables, and NumPy reference implementations."""
