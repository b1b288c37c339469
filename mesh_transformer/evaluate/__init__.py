# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint -> numbers that can be compared: bits per byte of text, and tasks of the evaluation harness, offline."""
