# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Conversion of checkpoints between the native, Hugging Face, GGUF and mesh-transformer-jax formats.

`conversion` runs the steps of a conversion: `readers` opens the source and returns an import plan (`import_plan`), whose
arrays are lazy (`lazy_arrays`); `writers` reads these arrays slice by slice and writes the result; `bit_check` and
`logit_check` compare source and result; `destination` publishes the result.
"""
