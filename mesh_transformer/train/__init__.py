# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Training: loss, optimizer, training step, loop, resume and provenance."""
