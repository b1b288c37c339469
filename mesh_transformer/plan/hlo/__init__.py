# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Analysis of compiled HLO text: instructions, collectives and memory traffic."""
