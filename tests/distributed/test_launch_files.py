"""The files of examples/launch: valid, and what they start does train, on processes of this machine."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from remoe.training.run import Run
from tests.distributed.processes import free_port

LAUNCH = Path(__file__).resolve().parents[2] / "examples" / "launch"
STEPS = 4
SMALL = ["demo-relu", "--set", f"train.steps={STEPS}", "train.validation_batches=1", "--no-report"]

pytestmark = pytest.mark.xdist_group("distributed")


def environment(**values: str) -> dict[str, str]:
    """One thread, no GPU, and torchrun of this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path} | values


def container_of(name: str) -> dict[str, Any]:
    """The one container of the pods in a file."""
    spec = list(yaml.safe_load_all((LAUNCH / name).read_text()))[-1]["spec"]
    template = spec["template"] if "template" in spec else spec["pytorchReplicaSpecs"]["Worker"]["template"]
    (container,) = template["spec"]["containers"]
    return container | {"grace": template["spec"]["terminationGracePeriodSeconds"], "pods": spec}


def options(container: dict[str, Any]) -> dict[str, str]:
    return dict(argument[2:].split("=") for argument in container["args"] if "=" in argument)


def locally(container: dict[str, Any], root: Path, **changed: str) -> list[str]:
    """The container's command with some of torchrun's options changed, for a small run below `root`."""
    arguments = container["args"]
    launcher = arguments[: arguments.index("-m")]
    given = dict(argument[2:].split("=") for argument in launcher) | changed
    train = [SMALL[0] if argument == "remoe-469m-relu" else argument for argument in arguments[len(launcher) :]]
    train = [f"--root={root}" if argument == "--root=/runs" else argument for argument in train]
    return [*container["command"], *(f"--{key}={value}" for key, value in given.items()), *train, *SMALL[1:]]


def test_the_slurm_script_is_bash_with_options_that_slurm_reads():
    script = (LAUNCH / "slurm.sbatch").read_text()
    assert subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"], check=False).returncode == 0
    lines = script.splitlines()
    read = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(read) < first_command, "SLURM stops reading at the first command"
    assert all("=" in lines[number] or lines[number].endswith("requeue") for number in read)
    assert all("#" not in lines[number][1:] for number in read), "a comment would become part of the option"
    grace = next(int(lines[number].split("@")[1]) for number in read if "--signal" in lines[number])
    assert f"--shutdown-timeout {grace - 30} " in script


@pytest.mark.slow
def test_what_the_slurm_script_starts_trains_on_all_processes(tmp_path: Path):
    for name, body in (("srun", 'exec "$@"'), ("scontrol", "echo localhost")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1"}
    job |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2"}
    variables = environment(**job)
    variables["PATH"] = f"{tmp_path}{os.pathsep}{variables['PATH']}"
    command = ["bash", str(LAUNCH / "slurm.sbatch"), *SMALL]
    finished = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=400, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert Run.open(tmp_path / "runs" / "demo-relu").step == STEPS


def test_kubernetes_files_agree_with_themselves():
    job, elastic = container_of("kubernetes-job.yaml"), container_of("kubernetes-pytorchjob.yaml")
    service, _ = yaml.safe_load_all((LAUNCH / "kubernetes-job.yaml").read_text())
    assert job["pods"]["completionMode"] == "Indexed"
    assert str(job["pods"]["completions"]) == str(job["pods"]["parallelism"]) == options(job)["nnodes"]
    assert str(job["resources"]["limits"]["nvidia.com/gpu"]) == options(job)["nproc-per-node"]
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert job["pods"]["template"]["spec"]["subdomain"] == name
    assert options(job)["rdzv-endpoint"] == f"{name}-0.{name}:{port}"
    assert str(elastic["resources"]["limits"]["nvidia.com/gpu"]) == elastic["pods"]["nprocPerNode"]
    policy = elastic["pods"]["elasticPolicy"]
    replicas = elastic["pods"]["pytorchReplicaSpecs"]["Worker"]["replicas"]
    assert policy["minReplicas"] <= replicas <= policy["maxReplicas"]
    for container in (job, elastic):
        assert int(options(container)["shutdown-timeout"]) < container["grace"]


@pytest.mark.slow
def test_what_the_pods_of_the_job_start_trains_together(tmp_path: Path):
    local = {"nproc-per-node": "1", "rdzv-endpoint": f"127.0.0.1:{free_port()}"}
    container = container_of("kubernetes-job.yaml")
    command = locally(container, tmp_path, **local)
    own = {entry["name"]: entry["value"] for entry in container["env"]} | {"OMP_NUM_THREADS": "1"}
    pods = [subprocess.Popen(command, env=environment() | own, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [pod.communicate(timeout=400)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said[0][-3000:]
    assert Run.open(tmp_path / "demo-relu").step == STEPS


@pytest.mark.slow
def test_what_a_pod_of_the_pytorchjob_starts_trains_with_what_the_operator_sets(tmp_path: Path):
    container = container_of("kubernetes-pytorchjob.yaml")
    policy = container["pods"]["elasticPolicy"]
    of_operator = {
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
        "PET_NPROC_PER_NODE": "2",
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "PET_RDZV_ID": "remoe",
        "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
        "PET_RDZV_CONF": "last_call_timeout=1",
    }
    own = {entry["name"]: entry["value"] for entry in container["env"]}
    command = locally(container, tmp_path)
    assert own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    variables = environment(**of_operator) | own | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=400, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert Run.open(tmp_path / "demo-relu").step == STEPS
