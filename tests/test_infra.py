"""Laws of infra/, the Makefile and pyproject.toml: what they name exists, and what they ask for fits the recipes."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from jobs import recipes
from jobs.command_line import from_command_line
from ldm.config import Config
from ldm.training.local_launch import LaunchConfig
from ldm.training.zero_config import OURS
from pipeline.latent_config import Device, LatentsConfig

HOUSE = Path(__file__).parents[1]
INFRA = HOUSE / "infra"
DEEPSPEED = sorted((INFRA / "deepspeed").glob("*.json"), key=lambda path: path.stem)
YAMLS = sorted(INFRA.rglob("*.yaml"))
RAYJOBS = sorted((INFRA / "kuberay").glob("*.yaml"))
TEXTS = [HOUSE / "Makefile", *(path for path in sorted(INFRA.rglob("*")) if path.is_file())]
MANIFEST = re.compile(r"python3? (?:-m jobs\.(\w+)|jobs/(\w+)\.py)|PY\) -m jobs\.(\w+)|\"-m\", \"jobs\.(\w+)\"")


def load(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def containers(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield from group["template"]["spec"]["containers"]


def asked_for(job: dict[str, Any]) -> Config:
    """The config that a RayJob's entrypoint gives, by the job's own command line."""
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["python", "-m"]
    name = words[2].removeprefix("jobs.")
    config: Config = from_command_line(name, getattr(recipes, name.upper()), words[3:]).config
    return config


def test_every_job_that_infra_or_the_makefile_starts_exists() -> None:
    named = {name for path in TEXTS for found in MANIFEST.findall(path.read_text()) for name in found if name}
    assert {"demo", "train_ldm", "precompute_latents", "shard_dataset"} <= named
    assert [name for name in sorted(named) if not (HOUSE / "jobs" / f"{name}.py").is_file()] == []


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_yaml_file_holds_a_mapping(path: Path) -> None:
    assert load(path)


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_a_deepspeed_file_holds_only_what_deepspeed_owns(path: Path) -> None:
    settings = json.loads(path.read_text())
    assert set(settings) & set(OURS) == set()
    assert set(settings) == {"zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"}
    assert settings["zero_allow_untested_optimizer"] is True
    assert settings["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_a_deepspeed_file_does_what_its_name_says_and_deepspeed_knows_every_key(path: Path) -> None:
    schema = importlib.import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    zero = json.loads(path.read_text())["zero_optimization"]
    known = set(schema.model_fields) | {field.alias for field in schema.model_fields.values()}
    assert set(zero) <= known
    parsed = schema(**zero)
    assert f"zero{int(parsed.stage)}" == path.stem.removesuffix("-offload")
    assert (parsed.offload_optimizer is not None) == path.stem.endswith("-offload")
    assert (parsed.offload_param is not None) == (path.stem == "zero3-offload")


def test_every_stage_has_its_deepspeed_file() -> None:
    assert [path.stem for path in DEEPSPEED] == ["zero0", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"]


def test_the_cluster_launcher_file_fits_rays_own_schema() -> None:
    cluster = load(INFRA / "ray-cluster.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]


def test_the_cluster_grows_for_sharding_on_cpus_and_for_training_on_gpus() -> None:
    cluster = load(INFRA / "ray-cluster.yaml")
    workers = {
        name: kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]
    }
    assert any(kind["resources"].get("GPU") and kind["max_workers"] for kind in workers.values())
    assert any("GPU" not in kind["resources"] and kind["max_workers"] for kind in workers.values())
    assert all(kind["min_workers"] == 0 for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) <= cluster["max_workers"]


@pytest.mark.parametrize("path", RAYJOBS, ids=lambda path: path.stem)
def test_a_rayjob_ends_with_its_job_and_runs_one_image_of_one_ray(path: Path) -> None:
    job = load(path)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == importlib.metadata.version("ray")
    images = {container["image"] for container in containers(job)}
    assert images == {load(INFRA / "ray-cluster.yaml")["docker"]["image"]}
    for container in containers(job):
        names = {variable["name"] for variable in container["env"]}
        assert {"MLFLOW_TRACKING_URI", "AWS_DEFAULT_REGION"} <= names
        assert container["envFrom"] == [{"secretRef": {"name": "latent-diffusion-s3"}}]


@pytest.mark.parametrize("path", RAYJOBS, ids=lambda path: path.stem)
def test_a_rayjob_asks_for_the_gpus_and_cpus_that_its_recipe_uses(path: Path) -> None:
    job = load(path)
    config = asked_for(job)
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups)
    gpus, cpus = (
        sum(group["maxReplicas"] * resource_of(group, name) for group in groups) for name in ("nvidia.com/gpu", "cpu")
    )
    if isinstance(config, LatentsConfig):
        assert config.device is Device.CUDA, "the driver sits on a head without a GPU, so auto would mean the CPU"
        assert gpus >= 1
        assert cpus >= gpus * config.num_cpus
    else:
        launch: LaunchConfig = config.launch  # type: ignore[attr-defined]
        assert launch.gpus_per_worker > 0
        assert gpus >= launch.num_workers * launch.gpus_per_worker
        assert cpus >= launch.num_workers * launch.cpus_per_worker


def resource_of(group: dict[str, Any], name: str) -> float:
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    return float(resources["limits"].get(name, 0))


@pytest.mark.parametrize("path", RAYJOBS, ids=lambda path: path.stem)
def test_what_a_worker_mounts_is_there(path: Path) -> None:
    for group in load(path)["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_image_copies_only_what_is_there_and_what_its_ignore_file_lets_through() -> None:
    copies = re.findall(r"^COPY --chown=\S+ (.+) \S+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    copied = {name for line in copies for name in line.split()}
    allowed = re.findall(r"^!(.+)$", (INFRA / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert {"ldm", "pipeline", "jobs", "infra", "pyproject.toml"} <= copied
    assert [name for name in sorted(copied) if not (HOUSE / name).exists()] == []
    assert {name.split("/")[0] for name in copied} == set(allowed)
    assert re.search(r"^USER (?!root)", (INFRA / "Dockerfile").read_text(), re.MULTILINE)


def test_the_mlflow_server_keeps_runs_in_postgresql_and_artefacts_in_s3() -> None:
    services = load(INFRA / "mlflow" / "compose.yaml")["services"]
    server = services["mlflow"]
    assert server["environment"]["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql://")
    assert (
        server["environment"]["MLFLOW_ARTIFACTS_DESTINATION"]
        == f"s3://{services['s3']['environment']['S3_BUCKET']}/artifacts"
    )
    assert set(server["depends_on"]) == {"database", "s3"}
    volumes = load(INFRA / "mlflow" / "compose.yaml")["volumes"]
    assert {mount.split(":")[0] for name in ("database", "s3") for mount in services[name]["volumes"]} == set(volumes)
    assert f"mlflow=={importlib.metadata.version('mlflow')} " in (INFRA / "mlflow" / "Dockerfile").read_text()


def test_every_secret_of_the_mlflow_server_comes_from_outside() -> None:
    services = load(INFRA / "mlflow" / "compose.yaml")["services"]
    secrets = {
        f"{service}.{name}": value
        for service, settings in services.items()
        for name, value in settings["environment"].items()
        if re.search("PASSWORD|ACCESS_KEY|BACKEND_STORE_URI", name)
    }
    assert len(secrets) == 6
    assert [name for name, value in secrets.items() if not re.search(r"\$\{\w+:\?", value)] == []


def test_every_dependency_has_a_known_good_version_within_its_bounds() -> None:
    requirement = importlib.import_module("packaging.requirements").Requirement
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    lines = (INFRA / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    versions = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        wanted = requirement(text)
        version = versions.get(wanted.name.lower().replace("_", "-"))
        assert version is not None, f"{wanted.name} is not in infra/constraints.txt"
        assert wanted.specifier.contains(version), f"{wanted.name} {version} does not fit {wanted.specifier}"


def test_make_without_a_target_lists_every_target() -> None:
    done = subprocess.run(
        ["make", "-C", str(HOUSE), "--no-print-directory"], capture_output=True, text=True, check=True
    )
    listed = [line.split()[1] for line in done.stdout.splitlines()]
    assert listed == ["help", "install", "demo", "test", "check", "soak", "clean"]
