# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Offline programs. They run from a clone as `python scripts/NAME.py` and are installed as mesh_transformer.scripts."""
