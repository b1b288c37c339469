# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Datasheet of a corpus: measurements, questions and the HTML page."""
