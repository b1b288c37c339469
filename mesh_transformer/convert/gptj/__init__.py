# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""mesh-transformer-jax (GPT-J v1) checkpoints: reader and writer."""
