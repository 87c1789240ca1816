"""docker/kubernetes: Kubernetes and KubeRay accept it, and it is the cluster of compose.yaml and cluster.yaml.

`kuberay.json` holds KubeRay's own schemas, and says where they are from.
"""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.utils import canonicalize_name

from aliprod.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docker" / "kubernetes"
KUBERAY = json.loads((ROOT / "tests" / "kuberay.json").read_text())
KUBERNETES = "1.34"
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}

OBJECTS = [
    each
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for each in yaml.safe_load_all(path.read_text())
]


def named(kind: str, name: str) -> Any:
    [found] = [each for each in OBJECTS if each["kind"] == kind and each["metadata"].get("name") == name]
    return found["spec"]


def accept(each: dict[str, Any]) -> None:
    """Raise what Kubernetes, or KubeRay's CRDs, would refuse."""
    if each["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
        return
    jsonschema.validate(each, KUBERAY | {"$ref": f"#/$defs/{each['kind']}"})
    for template in templates(each):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "PodTemplate", "template": template}, KUBERNETES, True
        )


def templates(each: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods that an object makes."""
    spec = each.get("spec", {})
    groups = [spec, spec.get("headGroupSpec", {}), *spec.get("workerGroupSpecs", [])]
    return [group["template"] for group in groups if "template" in group]


def containers() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each container with its pod."""
    for each in OBJECTS:
        for template in templates(each):
            yield from ((container, template["spec"]) for container in template["spec"]["containers"])


def variables(container: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}


# Accepted


@pytest.mark.parametrize("each", OBJECTS, ids=lambda each: each["kind"])
def test_its_schema_accepts_it(each: dict[str, Any]) -> None:
    accept(each)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", ("spec", "rayVersoin"), "2"),
        ("RayCluster", ("spec", "workerGroupSpecs", 0, "maxReplicas"), "many"),
        ("RayCluster", ("spec", "authOptions", "mode"), "password"),
        ("RayCluster", ("spec", "workerGroupSpecs", 1, "template", "spec", "tolerations", 0, "efect"), "NoSchedule"),
        ("RayJob", ("spec", "entryPoint"), "python"),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "readynessProbe"), {}),
        ("NetworkPolicy", ("spec", "ingres"), []),
    ],
)
def test_a_schema_refuses_what_is_misspelt(kind: str, path: tuple[str | int, ...], value: Any) -> None:
    each = copy.deepcopy(next(each for each in OBJECTS if each["kind"] == kind))
    where: Any = each
    for step in path[:-1]:
        where = where[step]
    where[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        accept(each)


def test_what_is_yours_on_the_page_makes_one_namespace_with_your_images(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl, whose kustomize reads the folder")
    page = (ROOT / "docs" / "clusters.md").read_text()
    [yours] = re.findall(r"```yaml\n# kubernetes/kustomization.yaml\n(.*?)```", page, re.DOTALL)
    shutil.copytree(FOLDER, tmp_path / "docker" / "kubernetes")
    (tmp_path / "kubernetes").mkdir()
    (tmp_path / "kubernetes" / "kustomization.yaml").write_text(yours)
    command = ["kubectl", "kustomize", tmp_path / "kubernetes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    for each in found:
        accept(each)
    assert len(found) == len(OBJECTS)  # without the RayJob, with the ConfigMap
    assert {each["metadata"].get("namespace") for each in found if each["kind"] != "Namespace"} == {"aliprod"}
    ours = {f"registry.example/{name}:{VERSION}" for name in ("aliprod", "aliprod-mlflow")}
    assert set(re.findall(r"image: (\S+)", done.stdout)) == ours | {COMPOSE["services"]["postgres"]["image"]}
    assert {line.split(": ")[1] for line in done.stdout.splitlines() if "s3:" in line} == {
        "s3://ours/runs",
        "s3://ours/mlflow",
    }


# The same everywhere


def test_images_are_those_of_compose() -> None:
    ours = {container["image"] for container, _ in containers()}
    assert ours == {service["image"] for service in COMPOSE["services"].values()}


def test_ray_is_that_of_the_constraints_in_all_three() -> None:
    assert named("RayCluster", "aliprod")["rayVersion"] == PINS["ray"]
    assert f":{PINS['ray']}-" in CLUSTER["docker"]["head_image"]
    assert (
        named("RayCluster", "aliprod")["autoscalerOptions"]["idleTimeoutSeconds"]
        == 60 * CLUSTER["idle_timeout_minutes"]
    )


def test_ray_is_told_the_same_in_all_three() -> None:
    options = " ".join(CLUSTER["docker"]["run_options"] + CLUSTER["docker"]["head_run_options"])
    compose, pods = COMPOSE["services"]["head"]["environment"], [c for c, _ in containers() if c["name"] == "ray"]
    assert len(pods) == 3
    told = variables(pods[0])
    assert all(variables(pod) == told for pod in pods)
    assert told.pop("ALIPROD_CACHE") == "/cache"  # of a bucket, which compose has none of
    # RAY_AUTH_*: authOptions
    assert set(compose) - {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} == set(told) | {"ALIPROD_STORAGE"}
    assert set(re.findall(r"-e (\w+)=", options)) & set(told) == set(told) - {
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",  # there MLflow listens on loopback alone
    }
    same = {name: value for name, value in told.items() if isinstance(value, str)}
    assert same == {name: compose[name] for name in same}
    assert named("RayCluster", "aliprod")["authOptions"] == {"mode": compose["RAY_AUTH_MODE"]}


def test_mlflow_and_postgres_are_told_the_same_as_in_compose() -> None:
    for name in ("mlflow", "postgres"):
        [told] = [variables(container) for container, _ in containers() if container["name"] == name]
        compose = COMPOSE["services"][name]["environment"]
        assert set(told) - {"PGDATA"} == set(compose)
        assert {k: v for k, v in told.items() if isinstance(v, str) and k != "PGDATA"} == {
            k: v for k, v in compose.items() if "$" not in v
        }


def test_a_job_has_the_environment_of_a_submitted_one_and_knows_how_far_the_cluster_grows() -> None:
    [job] = [each["spec"] for each in OBJECTS if each["kind"] == "RayJob"]
    ours, theirs = (
        yaml.safe_load(t)["env_vars"] for t in (job["runtimeEnvYAML"], (ROOT / "jobs/runtime_env.yaml").read_text())
    )
    assert ours == theirs
    assert job["clusterSelector"] == {"ray.io/cluster": "aliprod"}
    sizes = [
        (group["maxReplicas"], group["template"]["spec"]["containers"][0]["resources"]["limits"])
        for group in named("RayCluster", "aliprod")["workerGroupSpecs"]
    ]
    gpus, cpus = (sum(most * int(limits[name]) for most, limits in sizes) for name in ("nvidia.com/gpu", "cpu"))
    assert f"--set cluster.max_gpus={gpus} --set cluster.max_cpus={cpus}" in job["entrypoint"]


def test_ports_are_those_of_compose_and_of_the_image() -> None:
    recipe = (ROOT / "docker" / "Dockerfile").read_text()
    published = {
        port.rsplit(":", 1)[1] for service in COMPOSE["services"].values() for port in service.get("ports", [])
    }
    open_ports = {port["containerPort"] for container, _ in containers() for port in container.get("ports", [])}
    assert {int(port) for port in published} | {6379, 5432} == open_ports
    [mlflow] = [container for container, _ in containers() if container["name"] == "mlflow"]
    for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
        call = mlflow[probe]["httpGet"]
        [header] = call["httpHeaders"]
        assert f"http://{header['value']}{call['path']}'" in recipe
        assert header["value"] in re.findall(r"MLFLOW_SERVER_ALLOWED_HOSTS=([^,]+),", recipe)


# Whole, and closed


def test_what_is_referred_to_is_there_or_made_by_the_commands_of_the_page() -> None:
    text = "\n".join(path.read_text() for path in FOLDER.glob("*.yaml"))
    page = (ROOT / "docs" / "clusters.md").read_text()
    secrets = set(re.findall(r"secretKeyRef: \{name: (\w+), key: (\w+)\}", text))
    assert secrets
    for name, key in secrets:
        assert re.search(rf"create secret generic {name} [^`]*--from-literal={key}=", page), (name, key)
    for name in set(re.findall(r"secretRef: \{name: (\w+)", text)):
        assert f"create secret generic {name} " in page
    [places] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["configMapGenerator"]
    assert set(re.findall(r"configMapRef: \{name: (\w+)\}", text)) == {places["name"]}
    assert [line.split("=")[0] for line in places["literals"]] == ["ALIPROD_STORAGE", "MLFLOW_ARTIFACTS_DESTINATION"]


def test_no_container_is_root_or_without_limits_or_has_a_secret_in_its_file() -> None:
    for container, pod in containers():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"]["cpu"]
        for name, value in variables(container).items():
            assert not (re.search("PASSWORD|SECRET|TOKEN", name) and isinstance(value, str)), name


def test_only_who_needs_a_port_reaches_it() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in OBJECTS if each["kind"] == "NetworkPolicy"}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, port in (("postgres", 5432), ("mlflow", 5000), ("dashboard", 8265)):
        [rule] = policies[name]["ingress"]
        assert [each["port"] for each in rule["ports"]] == [port]
    reaches = {
        name: policies[name]["ingress"][0]["from"][0]["podSelector"]["matchLabels"] for name in ("postgres", "mlflow")
    }
    assert reaches == {
        "postgres": named("Deployment", "mlflow")["selector"]["matchLabels"],
        "mlflow": {"ray.io/cluster": "aliprod", "ray.io/node-type": "head"},  # the driver's
    }
    for kind, name in (("Deployment", "mlflow"), ("StatefulSet", "postgres")):
        labels = named(kind, name)["template"]["metadata"]["labels"]
        assert named(kind, name)["selector"]["matchLabels"] == labels == named("Service", name)["selector"]
        assert policies[name]["podSelector"] == {"matchLabels": labels}
