# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of mesh-transformer-jax (GPT-J v1): reader, writer and reference implementation."""
