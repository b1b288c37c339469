# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights that files store quantized, as lazily dequantized tensors under their plain names."""
