# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Planner: compile a run for absent hardware and report memory, FLOPs, communication, step time and fit."""
