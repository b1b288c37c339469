# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Metrics log, console progress, HTML run report and evaluation results."""
