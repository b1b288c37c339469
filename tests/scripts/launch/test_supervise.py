# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The supervisor, with real processes that end in every way, and the launchers that use it."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from tiny_run import write_tiny_run

ROOT = Path(__file__).parents[3]
LAUNCH = ROOT / "scripts" / "launch"
# A command whose attempts end as its arguments say, one per attempt: an exit status, "hang", or "wait" for a signal; after
# "+" it takes a step first.
CHILD = """
import os, pathlib, signal, sys, time
count = pathlib.Path(sys.argv[1])
number = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (number + 1))
how = sys.argv[2:][number]
if how.startswith("+"):
    pathlib.Path(os.environ["MESH_TRANSFORMER_PROGRESS"]).touch()
how = how.lstrip("+")
if how == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    print("waiting", flush=True)
if how in ("wait", "hang"):
    time.sleep(100)
sys.exit(int(how))
"""


def supervise(tmp_path, options, *how, **more):
    options = ["--pause", "0.01", *options]
    command = [
        sys.executable,
        LAUNCH / "supervise.py",
        *options,
        "--",
        sys.executable,
        "-c",
        CHILD,
        tmp_path / "count",
        *how,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.parametrize(
    ("options", "how", "status", "attempts"),
    [
        ([], ["1", "75", "0"], 0, 3),
        ([], ["2"], 2, 1),
        (["--no-restart-on-preemption"], ["1", "75"], 75, 2),
        (["--max-failures", "3"], ["1"] * 9, 1, 3),
        (["--max-failures", "2"], ["+1", "1", "+1", "+1", "0"], 1, 2),
        (["--max-failures", "3"], ["+1", "1", "+1", "+1", "0"], 0, 5),
        (["--hang-minutes", "0.02"], ["hang", "+0"], 0, 2),
    ],
)
def test_restarts(tmp_path, options, how, status, attempts):
    with supervise(tmp_path, options, *how) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert len((tmp_path / "count").read_text()) == attempts
    assert ("no step for 0.02 minutes" in errors) == ("hang" in how)


def test_a_signal_is_forwarded_and_ends_supervision(tmp_path):
    with supervise(tmp_path, [], "wait", "0") as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert len((tmp_path / "count").read_text()) == 1


def run(*command, seconds=120, **environment):
    paths = {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **paths}, capture_output=True, text=True, timeout=seconds, check=False
    )


def test_local_processes():
    """Each process knows its index, which is in front of its output; after a failure the others are ended."""
    child = "import os, sys, time; i = int(os.environ['JAX_PROCESS_ID']); print('this is', i, flush=True); "
    local = (sys.executable, LAUNCH / "local.py", "2", "--grace", "0.5", "--", sys.executable, "-c")
    done = run(*local, child + "sys.exit(0)")
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["[1] this is 1", "this is 0"])
    assert run(*local, child + "sys.exit(75)").returncode == 75
    assert run(*local, child + "sys.exit(75 * i)").returncode == 1, "only one of two processes was preempted"
    started = time.monotonic()
    assert run(*local, child + "i or time.sleep(100); sys.exit(3)").returncode == 3
    assert time.monotonic() - started < 30


def test_tpu_vms_dry_run():
    train = ["run.toml", "--set", 'run.dir="gs://bucket/a run"']
    done = run(sys.executable, LAUNCH / "tpu_vms.py", "pod", "--zone", "z", "--setup", "--dry-run", "--", *train)
    assert done.returncode == 0, done.stderr
    gcloud = shlex.split(done.stdout)
    assert gcloud[:8] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=z", "--worker=all"]
    folder, *_, last = gcloud[8].removeprefix("--command=").split(" && ")
    assert folder == "cd mesh-transformer"
    assert shlex.split(last)[-3:] == ['run.dir="gs://bucket/a run"', "--set", 'mesh.processes="auto"']


def test_slurm_dry_run(tmp_path):
    """Run the script with fake Slurm commands, and check its sbatch options, which are comments to bash."""
    script = LAUNCH / "slurm.sh"
    assert run("bash", "-n", script).returncode == 0
    done = run(
        "bash", script, "run.toml", "--set", 'run.dir="a b"', DRY_RUN="1", PYTHON="py", SLURM_SUBMIT_DIR=str(ROOT)
    )
    srun, requeue = done.stdout.splitlines()
    assert srun.startswith(
        "srun --kill-on-bad-exit=1 py scripts/launch/supervise.py --no-restart-on-preemption -- py device_train.py"
    )
    assert requeue.startswith("scontrol requeue")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE))
    assert len(options) == script.read_text().count("\n#SBATCH"), "sbatch does not accept one of the lines"
    assert re.fullmatch(r"USR1@[0-9]+", options["signal"])
    assert {"requeue", "open-mode", "time", "nodes", "ntasks-per-node"} <= options.keys()
    for status in (0, 1, 75):  # fake Slurm commands that log their arguments
        for name, exit_status in (("srun", status), ("scontrol", 0)):
            path = tmp_path / name
            path.write_text(f'#!/bin/sh\necho "{name} $@" >> {tmp_path}/calls.{status}\nexit {exit_status}\n')
            path.chmod(0o755)
        called = run("bash", script, "run.toml", PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7")
        assert called.returncode == status
        assert ("scontrol requeue 7" in (tmp_path / f"calls.{status}").read_text()) == (status == 75)
    if shutil.which("shellcheck"):
        checked = run("shellcheck", script)
        assert checked.returncode == 0, checked.stdout


def test_jobset_is_valid():
    """The job template is checked with Kubernetes' schema, the fields around it with JobSet's documented names."""
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) <= {
        "replicatedJobs",
        "network",
        "successPolicy",
        "failurePolicy",
        "startupPolicy",
        "suspend",
    }
    (job,) = jobset["spec"]["replicatedJobs"]
    assert set(job) == {"name", "replicas", "template"}
    manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["template"]["spec"]}
    validate.validate(manifest, "1.30", strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate(manifest | {"spec": manifest["spec"] | {"paralelism": 4}}, "1.30", strict=True)
    environment = {entry["name"]: entry for entry in manifest["spec"]["template"]["spec"]["containers"][0]["env"]}
    name = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}"
    assert environment["JAX_COORDINATOR_ADDRESS"]["value"].partition(":")[0] == name
    assert (
        int(environment["JAX_NUM_PROCESSES"]["value"])
        == manifest["spec"]["parallelism"]
        == manifest["spec"]["completions"]
    )
    command = manifest["spec"]["template"]["spec"]["containers"][0]["command"]
    assert tomllib.loads(command[-1]) == {"run": {"dir": "gs://bucket/run"}}


def test_ray_dry_run():
    done = run(sys.executable, LAUNCH / "ray_cluster.py", "2", "--port", "1234", "--dry-run", "--", "run.toml")
    first, second = done.stdout.splitlines()
    assert first.startswith("JAX_COORDINATOR_ADDRESS=NODE_0:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 ")
    assert second.replace("JAX_PROCESS_ID=1", "JAX_PROCESS_ID=0") == first
    assert second.endswith("device_train.py run.toml")


@pytest.mark.filterwarnings("ignore")  # warnings of Ray
def test_ray_cluster_of_two_nodes(tmp_path, monkeypatch):
    """A run of two processes on a real Ray cluster of two nodes on this machine."""
    pytest.importorskip("ray", reason="needs ray")
    from ray.cluster_utils import Cluster

    (tmp_path / "text.txt").write_text(" ".join(map(str, range(2000))))
    write_tiny_run(
        tmp_path / "tiny.toml", tmp_path / "text.txt", tmp_path / "run", mesh=dict(cpu_devices=1), train=dict(steps=2)
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        launcher = (sys.executable, LAUNCH / "ray_cluster.py", "2", "--port", port, "--", str(tmp_path / "tiny.toml"))
        done = run(*launcher, RAY_ADDRESS=cluster.address, JAX_PLATFORMS="cpu", seconds=600)
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "run" / "checkpoints" / "step_2" / "COMMIT").is_file()
    assert '"processes": 2' in (tmp_path / "run" / "recipe.json").read_text()
