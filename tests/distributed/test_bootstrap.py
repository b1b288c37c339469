# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of how a process finds its coordinator and its number."""

import pytest

from mesh_transformer.config import ConfigError, MeshConfig
from mesh_transformer.distributed.bootstrap import ProcessConfig, detect_process

JAX_VARIABLES = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("config", "environment", "process"),
    [
        ({}, {}, None),
        ({"processes": 1}, SLURM, None),
        (dict(processes=2, process_id=1, coordinator="a:1"), {}, ProcessConfig("a:1", 2, 1)),
        ({}, JAX_VARIABLES, ProcessConfig("a:1", 2, 0)),
        (dict(process_id=1), JAX_VARIABLES, ProcessConfig("a:1", 2, 1)),
        ({}, SLURM, ProcessConfig(None, None, None)),
        ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, ProcessConfig(None, None, None)),
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, ProcessConfig(None, None, None)),
        ({}, {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"processes": "auto"}, {}, ProcessConfig(None, None, None)),
    ],
)
def test_process_is_detected(config, environment, process):
    assert detect_process(MeshConfig(**config), environment) == process


@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        (dict(processes=2), {}, "mesh.processes = 2, but mesh.coordinator is not set"),
        (dict(processes=2, coordinator="a:1"), {}, "but mesh.process_id is not set; .*JAX_PROCESS_ID"),
        (dict(processes=2, coordinator="a", process_id=0), {}, 'mesh.coordinator = "a": expected HOST:PORT'),
        (
            dict(processes=2, coordinator="a:1", process_id=2),
            {},
            "mesh.process_id = 2 must be less than mesh.processes = 2",
        ),
        (dict(coordinator="a:1"), {}, 'mesh.coordinator = "a:1", but the number of processes is not set'),
        ({}, dict(JAX_PROCESS_ID="1"), "JAX_PROCESS_ID = 1, but the number of processes is not set"),
        ({}, dict(JAX_NUM_PROCESSES="two"), "JAX_NUM_PROCESSES is 'two', but must be a number"),
    ],
)
def test_incomplete_process_configuration_is_an_error(config, environment, message):
    with pytest.raises(ConfigError, match=message):
        detect_process(MeshConfig(**config), environment)
