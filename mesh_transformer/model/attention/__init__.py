# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values -> their mixture: what may be seen, and one kernel for each place it is computed."""
