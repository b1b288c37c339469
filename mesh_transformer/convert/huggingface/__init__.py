# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face model folders: configuration and tensor maps, reader, file formats and reference implementations."""
