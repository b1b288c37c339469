# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""state <-> disk: checkpoints that name their arrays, know no mesh, and refuse what is damaged."""
