"""The examples in deploy/: they are YAML of the right shape, what they name is there, and their commands are ones that the programs take."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from nim4.__main__ import build_parser
from nim4.serve.app import PATHS
from nim4.serve.triton_client import SCHEME

ROOT = Path(__file__).resolve().parents[3]
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
OBJECTS = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8")))
WORKLOADS = [item for item in OBJECTS if item["kind"] in ("Deployment", "StatefulSet")]
API = {"Service": "v1", "Deployment": "apps/v1", "StatefulSet": "apps/v1", "PodDisruptionBudget": "policy/v1"}


def named(kind):
    return {item["metadata"]["name"]: item for item in OBJECTS if item["kind"] == kind}


def parsed(args):
    """What the server makes of a command."""
    return build_parser().parse_args(args)


def ports_of_triton(command):
    return {int(port) for port in re.findall(r"--grpc-port=(\d+)", " ".join(command))}


def test_the_commands_are_ones_that_the_server_takes():
    (gateway,) = (item for item in WORKLOADS if item["metadata"]["name"] == "nim4-gateway")
    for args in (COMPOSE["services"]["gateway"]["command"], gateway["spec"]["template"]["spec"]["containers"][0]["args"]):
        options = parsed(args)
        assert (options.command, options.engine) == ("serve", "vllm")
        assert options.encoder.startswith(SCHEME)


def test_compose_names_what_is_there():
    services = COMPOSE["services"]
    for service in services.values():
        assert service.get("image") or service.get("build")
        assert set(service.get("depends_on", {})) <= set(services)
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
    gateway, triton = services["gateway"], services["triton"]
    assert "healthcheck" in triton, "the gateway waits for it"
    host, port = parsed(gateway["command"]).encoder.removeprefix(SCHEME).split(":")
    assert host in services
    assert ports_of_triton(triton["command"]) == {int(port)}
    assert (ROOT / "deploy" / gateway["build"]["context"] / gateway["build"]["dockerfile"]).resolve() == ROOT / "deploy" / "Dockerfile"
    mounted = [volume.rpartition("}:")[2].split(":")[0] for volume in gateway["volumes"]]
    options = parsed(gateway["command"])
    assert {str(options.model), *map(str, options.hotword_index)} <= set(mounted)


@pytest.mark.parametrize("item", OBJECTS, ids=lambda item: f"{item['kind']}-{item['metadata']['name']}")
def test_kubernetes_objects_have_their_shape(item):
    assert item["apiVersion"] == API[item["kind"]]
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", item["metadata"]["name"])
    assert item["spec"]


@pytest.mark.parametrize("item", WORKLOADS, ids=lambda item: item["metadata"]["name"])
def test_kubernetes_workloads_name_what_is_there(item):
    template = item["spec"]["template"]
    labels, pod = template["metadata"]["labels"], template["spec"]
    assert item["spec"]["selector"]["matchLabels"].items() <= labels.items()
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        ports = {port["name"] for port in container["ports"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container:
                request = container[probe]["httpGet"]
                assert request["port"] in ports
                assert request["path"] in PATHS or request["path"].startswith("/v2/health/")
        assert "nvidia.com/gpu" in container["resources"]["limits"]
    for service in named("Service").values():
        if service["spec"]["selector"].items() <= labels.items():
            for port in service["spec"]["ports"]:
                assert any(port["targetPort"] == own["name"] for container in pod["containers"] for own in container["ports"])
    budget = named("PodDisruptionBudget")[item["metadata"]["name"]]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_gateways_know_each_server_of_the_encoder():
    triton, gateway = named("StatefulSet")["nim4-triton"], named("Deployment")["nim4-gateway"]
    container = gateway["spec"]["template"]["spec"]["containers"][0]
    (port,) = ports_of_triton(triton["spec"]["template"]["spec"]["containers"][0]["args"])
    expected = [f"{SCHEME}nim4-triton-{number}.{triton['spec']['serviceName']}:{port}" for number in range(triton["spec"]["replicas"])]
    options = parsed(container["args"])
    assert options.encoder.split(",") == expected
    mounts = tuple(mount["mountPath"] for mount in container["volumeMounts"])
    for path in (options.model, options.api_keys, *options.hotword_index):
        assert str(path).startswith(mounts)
    assert container["ports"][0]["containerPort"] == options.port


def test_the_image_installs_what_is_there():
    lines = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("FROM vllm/") for line in lines)
    assert any("requirements.txt" in line for line in lines)
    assert (ROOT / "pyproject.toml").is_file()


def test_the_picture_is_svg_and_the_page_shows_it():
    picture = ROOT / "docs" / "architecture.svg"
    root = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    assert root.tag.endswith("svg")
    said = " ".join(root.itertext())
    for part in ("Triton", "vLLM", "gateway", "hotwords"):
        assert part in said
    assert "architecture.svg" in (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
