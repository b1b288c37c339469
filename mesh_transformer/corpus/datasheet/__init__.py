# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Datasheet of a corpus: content, questions and the HTML page."""
