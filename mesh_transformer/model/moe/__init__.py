# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts layers: router, dispatch to experts, and load-balancing losses."""
