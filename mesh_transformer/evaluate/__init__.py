# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation: perplexity, log-likelihoods, benchmark tasks and scaling-law fits."""
