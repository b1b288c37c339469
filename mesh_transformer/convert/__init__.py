# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Other worlds' checkpoints <-> ours: lazy arrays, a row of names for each family, and any to any, proved."""
