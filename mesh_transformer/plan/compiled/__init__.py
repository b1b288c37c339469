# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The text of a compiled program -> how often what runs, what it moves and where."""
