# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Sharded checkpoints: array format, manifest, atomic commit, and local and object-store backends."""
