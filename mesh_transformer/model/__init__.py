# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The transformer: parameters, attention, feed-forward, mixture of experts, and the forward pass."""
