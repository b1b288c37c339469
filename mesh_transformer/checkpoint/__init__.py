# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""state <-> disk: named global arrays without a mesh, whole or not there at all, and checked to the last byte."""
