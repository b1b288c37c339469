# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Quantized weights of model folders, as lazily dequantized tensors with the names of unquantized weights."""
