# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Local and object-store paths, atomic files, direct I/O, digests and storage errors."""
