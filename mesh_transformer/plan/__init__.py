# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A run's programs compiled for hardware that need not be there: memory, FLOPs, traffic, time, and whether it fits."""
