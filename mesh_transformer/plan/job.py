# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What is to be compiled, and what was measured of it: records that travel between processes as JSON."""

import dataclasses
import functools
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.config import Config, config_to_dict, parse_config

CODE_PACKAGES = (
    "model",
    "train",
    "sample",
    "plan",
)  # whose code, beside the modules above them, makes programs and records
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "dm-haiku", "optax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileJob:
    """One program of a run on one topology."""

    config: Config
    topology: str
    low_effort: bool = False  # least compiler effort: a fifth of the time, memory off by some percent either way
    batch: int = 0  # rows to sample for; 0: the program is the training step
    context: int = 0  # tokens of each row in the cache

    def to_json(self) -> str:
        """As text for another process."""
        return json.dumps({**dataclasses.asdict(self), "config": config_to_dict(self.config)})

    @classmethod
    def from_json(cls, text: str) -> "CompileJob":
        """From `to_json`."""
        table = json.loads(text)
        return cls(**{**table, "config": parse_config(table["config"], where="job")})

    def digest(self) -> str:
        """Equal for jobs whose program is the same: where a run lives, its data and its samples do not matter, but the code
        that makes the program does, and what compiles it.
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
    """Of what makes a program beside its job: the package's code, and the libraries that compile it."""
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(
        [*package.glob("*.py"), *(file for room in CODE_PACKAGES for file in (package / room).rglob("*.py"))]
    ):
        digest.update(f"{file.relative_to(package).as_posix()} ".encode() + file.read_bytes())
    for name in COMPILERS:
        try:
            digest.update(f"{name} {metadata.version(name)} ".encode())
        except metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()


class Traffic(NamedTuple):
    """Collective operations over some axes of the mesh in one step; see collectives.py."""

    axes: list[str]
    kind: str
    group: int
    count: int
    sent: float  # bytes, by every device
    torus_dims: int = 1  # directions of the torus that members of a group are spread over
    wrapped: bool = False  # whether those directions close to rings
    groups_spanned: int = 1  # slices, or hosts of GPUs, that a group is spread over


@dataclasses.dataclass(kw_only=True)
class CompiledStats:
    """What tracing and compiling found. Bytes are of one device, FLOPs of all together."""

    topology: str
    platform: str
    devices: int
    mesh: dict[str, int]
    parameters: int
    tokens: int  # in one step; drawn in one step where sampling
    flops: float  # the model's own
    hardware_flops: float  # with what is computed again
    bytes_by_kind: dict[
        str, int
    ]  # bytes of what goes into the program, from shapes: parameters, moments, other, batch, ...
    gradient_bytes: int  # bytes of all gradients at once, from shapes
    idle_bytes: int = 0  # of `kinds`, what lies there and the program does not touch
    state_bytes: int = 0  # of all devices together, replicas once: what a checkpoint holds
    argument_bytes: int = 0  # with what is idle, and so is the peak
    temporary_bytes: int = 0
    peak_bytes: int = 0
    activation_bytes: int = 0  # activations that the forward pass leaves to the backward pass
    logits_bytes: int = 0  # the largest array over the vocabulary
    hbm_bytes: float = 0.0  # moved in a step
    traffic: list[Traffic] = dataclasses.field(default_factory=list)
    compiler_error: str = ""  # the compiler's words where the program does not fit
    needed_bytes: int = 0  # its figures
    limit_bytes: int = 0
    device_kind: str = ""  # of devices that are here, as their maker names them
    compile_seconds: float = 0.0
    compiler: str = ""  # versions
    low_effort: bool = False
    sharding_table: str = ""
    encode: "CompiledStats | None" = None  # where a model with an encoder is sampled: the program that reads texts

    def to_json(self) -> str:
        """As text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "CompiledStats":
        """From `to_json`."""
        table: dict[str, Any] = json.loads(text)
        table["traffic"] = [Traffic(*row) for row in table["traffic"]]
        if table.get("reading"):
            table["reading"] = cls.from_json(json.dumps(table["reading"]))
        return cls(**table)
