# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compilation jobs and their statistics, which processes exchange as JSON."""

import dataclasses
import functools
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.config import Config, config_to_dict, parse_config

# Packages whose code determines the compiled programs, in addition to the top-level modules.
CODE_PACKAGES = ("config", "model", "train", "sample", "plan")
# Libraries whose versions determine the compiled programs.
LIBRARIES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "dm-haiku", "optax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileJob:
    """A program to compile: the training step or the decoding of a run, on one topology."""

    config: Config
    topology: str
    low_effort: bool = False  # lowest compiler effort: a fifth of the time, memory accurate to a few percent
    batch: int = 0  # sequences to decode; 0: the program is the training step
    context: int = 0  # length of the KV cache per sequence

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "config": config_to_dict(self.config)})

    @classmethod
    def from_json(cls, text: str) -> "CompileJob":
        table = json.loads(text)
        return cls(**{**table, "config": parse_config(table["config"], where="job")})

    def digest(self) -> str:
        """Return a digest for the cache of compiled statistics: jobs with the same digest have the same program.

        It covers the code that makes the program, the compiler's version and the configuration, except sections and fields
        that do not affect the program: run, checkpoint, sample, track, and most of data and serve. Jobs that differ only in
        another field without effect on the program, such as train.log_every, have different digests.
        """
        table = json.loads(self.to_json())
        for name in ("run", "checkpoint", "sample", "track"):
            table["config"].pop(name, None)
        for name in ("processes", "process_id", "coordinator", "heartbeat_seconds"):
            table["config"]["mesh"].pop(name, None)
        table["config"]["serve"] = {name: table["config"]["serve"][name] for name in ("weight_dtype", "kv_cache_dtype")}
        table["config"]["data"] = table["config"]["data"].get("isolate_documents")
        return hashlib.blake2b(
            f"{digest_code()} {json.dumps(table, sort_keys=True)}".encode(), digest_size=12
        ).hexdigest()


@functools.cache
def digest_code(package: Path = Path(__file__).parents[1]) -> str:
    """Return a digest of the top-level modules, of the packages in CODE_PACKAGES, and of the versions of LIBRARIES."""
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(
        [*package.glob("*.py"), *(file for name in CODE_PACKAGES for file in (package / name).rglob("*.py"))]
    ):
        digest.update(f"{file.relative_to(package).as_posix()} ".encode() + file.read_bytes())
    for name in LIBRARIES:
        try:
            digest.update(f"{name} {metadata.version(name)} ".encode())
        except metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()


class Traffic(NamedTuple):
    """Collective operations over some axes of the mesh in one step; see hlo/collectives.py."""

    axes: list[str]
    kind: str  # such as all-gather
    group: int  # devices per group
    count: int  # operations per step
    sent: float  # bytes per device
    torus_dims: int = 1  # dimensions of the torus that a group spans
    wrapped: bool = False  # whether these dimensions are rings
    groups_spanned: int = 1  # number of slices, or hosts of GPUs, that a group spans


@dataclasses.dataclass(kw_only=True)
class CompiledStats:
    """Statistics of a traced and compiled program. Bytes are per device, FLOPs are the sum over all devices."""

    topology: str
    platform: str
    devices: int
    mesh: dict[str, int]
    parameters: int
    tokens: int  # processed, or generated, in one step
    flops: float  # model FLOPs
    hardware_flops: float  # including recomputation
    bytes_by_kind: dict[str, int]  # of the arguments, from shapes; kinds such as parameters, moments, batch or cache
    gradient_bytes: int  # of all gradients, from shapes
    idle_bytes: int = 0  # weights in memory that the program does not use
    state_bytes: int = 0  # of all devices, without replicas: the size of a checkpoint
    argument_bytes: int = 0  # including idle_bytes
    temporary_bytes: int = 0
    peak_bytes: int = 0  # including idle_bytes
    activation_bytes: int = 0  # activations that the forward pass saves for the backward pass
    logits_bytes: int = 0  # the largest array with a vocabulary dimension
    hbm_bytes: float = 0.0  # moved to and from HBM in a step
    traffic: list[Traffic] = dataclasses.field(default_factory=list)
    compiler_error: str = ""  # the compiler's message if the program does not fit
    needed_bytes: int = 0  # stated in compiler_error
    limit_bytes: int = 0  # stated in compiler_error, or reported by local devices
    device_kind: str = ""  # of local devices, as reported by JAX
    compile_seconds: float = 0.0
    compiler: str = ""  # versions of JAX and of the compiler
    low_effort: bool = False
    sharding_table: str = ""
    encode: "CompiledStats | None" = None  # of an encoder-decoder model: the program that encodes prompts

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "CompiledStats":
        table: dict[str, Any] = json.loads(text)
        table["traffic"] = [Traffic(*fields) for fields in table["traffic"]]
        if table.get("encode"):
            table["encode"] = cls.from_json(json.dumps(table["encode"]))
        return cls(**table)
