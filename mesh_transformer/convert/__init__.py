# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Conversion of checkpoints between the native, Hugging Face, GGUF and mesh-transformer-jax formats.

Steps of a conversion, which `conversion` runs: `readers` opens a checkpoint as an `import_plan` of `lazy_arrays`; `writers`
reads the plan slice by slice and writes the result; `bit_check` and `logit_check` compare source and result; `destination`
publishes the result.
"""
