"""deploy/: valid by the schemas of Kubernetes and compose, and true to the code it starts."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import kubernetes_validate
import pytest
import tritonclient.grpc
import typer.main
from manifests import (
    DEPLOY,
    KUBERNETES,
    OPS,
    PORTS,
    PROJECT,
    RESOURCES,
    SETTINGS,
    SINCE,
    Document,
    container,
    documents,
    flags,
    named,
    of_kind,
    pods,
)
from prometheus_client import generate_latest
from support import ROOT, FakeBackend, triton_repository
from test_triton import infer, random_crops
from tritonclient.utils import InferenceServerException

import alexnet
from serving.admission import Admission, Limits
from serving.app import create_app
from serving.metrics import Metrics
from serving.settings import Settings
from serving.triton import LocalTriton, ask
from serving.triton_environment import environment


def _name(document: object) -> str | None:
    return f"{document['kind']}-{document['metadata']['name']}" if isinstance(document, dict) else None


# --- valid ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [SINCE, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("document", [each for _, each in RESOURCES], ids=_name)
def test_a_manifest_is_valid_and_has_no_unknown_field(document: Document, version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_refuse_a_misspelt_field() -> None:
    deployment = copy.deepcopy(next(each for _, each in RESOURCES if each["kind"] == "Deployment"))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, SINCE, strict=True)


def test_the_compose_file_is_valid() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    command.append(str(DEPLOY / "compose.yaml"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# --- true to the code ----------------------------------------------------------------------------


def _environments() -> Iterator[tuple[str, str]]:
    for name in pods():
        for variable in container(name).get("env", []):
            yield f"pod {name}", variable["name"]
    for name, service in documents(DEPLOY / "compose.yaml")[0]["services"].items():
        for variable in service.get("environment", {}):
            yield f"service {name}", variable
    for file in DEPLOY.glob("*.Dockerfile"):
        for variable in re.findall(r"(?:^ENV|^   ) (\w+)=", file.read_text(), re.MULTILINE):
            yield file.name, variable


def test_every_variable_of_ours_is_a_setting() -> None:
    known = {f"ALEXNET_{field.upper()}" for field in Settings.model_fields}
    ours = {(where, name) for where, name in _environments() if name.startswith("ALEXNET_")}
    assert len(ours) >= 8
    assert {(where, name) for where, name in ours if name not in known} == set()


def test_ports_are_the_codes_own() -> None:
    assert PORTS == {"gateway": 8000, "http": 8003, "grpc": 8001, "metrics": 8002}
    ports = {port["name"]: port["containerPort"] for port in container("triton")["ports"]}
    assert ports == {name: PORTS[name] for name in ("http", "grpc", "metrics")}
    started = flags(container("triton")["args"])
    compose = documents(DEPLOY / "compose.yaml")[0]["services"]
    beside = flags(compose["triton"]["command"])
    for name, port in ports.items():
        assert started[f"{name}-port"] == beside[f"{name}-port"] == str(port)
    ports = {port["name"]: port["containerPort"] for port in container("gateway")["ports"]}
    assert ports == {"http": PORTS["gateway"], "ops": OPS} and OPS not in PORTS.values()
    assert _variables("gateway")["ALEXNET_PORT"] == str(PORTS["gateway"])
    assert _variables("gateway")["ALEXNET_OPS_PORT"] == str(OPS)
    for target in ("triton:8001", compose["gateway"]["environment"]["ALEXNET_TRITON"]):
        assert target == f"triton:{PORTS['grpc']}"


def _variables(name: str) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container(name).get("env", [])}


def test_services_lead_to_ports_that_exist() -> None:
    for service in of_kind("Service"):
        name = service["metadata"]["name"]
        labels = pods()[name]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        ports = {port["name"] for port in container(name)["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_triton_is_headless_so_that_grpc_sees_each_pod() -> None:
    service = named(of_kind("Service"), "Service", "triton")
    assert service["spec"]["clusterIP"] == "None"
    assert {port["name"]: port["port"] for port in service["spec"]["ports"]}["grpc"] == PORTS["grpc"]


def test_probes_ask_routes_that_exist_and_life_does_not_depend_on_the_model() -> None:
    routes = {getattr(route, "path", "") for route in create_app(SETTINGS, FakeBackend()).routes}
    gateway = container("gateway")
    kinds = ("startup", "readiness", "liveness")
    paths = {kind: gateway[f"{kind}Probe"]["httpGet"]["path"] for kind in kinds}
    assert set(paths.values()) <= routes
    assert paths == {"startup": "/livez", "readiness": "/readyz", "liveness": "/livez"}
    scraped = pods()["gateway"]["metadata"]["annotations"]
    assert scraped["prometheus.io/path"] in routes and scraped["prometheus.io/port"] == str(OPS)
    asked = {gateway[f"{kind}Probe"]["httpGet"]["port"] for kind in kinds}
    assert asked == {"ops"}, "whether or not the public port speaks TLS"


@pytest.mark.parametrize("name", ["gateway", "score"])
def test_a_pods_command_parses(name: str) -> None:
    """As the command line itself parses it, without running it."""
    commands = typer.main.get_command(alexnet.app).commands  # type: ignore[attr-defined]
    command, *args = container(name)["args"]
    commands[command].make_context(command, list(args))
    with pytest.raises(Exception, match="No such option: --tritn"):
        commands[command].make_context(command, [*args, "--tritn", "triton:8001"])


def test_metrics_of_the_autoscalers_exist(triton: LocalTriton) -> None:
    wanted = {
        metric["pods"]["metric"]["name"]
        for document in of_kind("HorizontalPodAutoscaler")
        for metric in document["spec"]["metrics"]
        if metric["type"] == "Pods"
    }
    values = documents(KUBERNETES / "components/autoscaling/prometheus-adapter-values.yaml")[0]
    assert {rule["name"]["as"] for rule in values["rules"]["custom"]} == wanted
    assert {rule["seriesQuery"].partition("{")[0] for rule in values["rules"]["custom"]} == wanted
    ours = generate_latest(Metrics(Admission(Limits())).registry).decode()
    theirs = _text(f"http://{triton.metrics}/metrics")
    assert {name for name in wanted if f"# TYPE {name} gauge" in ours + theirs} == wanted


def _text(url: str) -> str:
    with urlopen(url, timeout=10) as response:
        return str(response.read(), "utf-8")


def test_autoscalers_act_well_before_requests_are_refused() -> None:
    targets = {
        metric["pods"]["metric"]["name"]: int(metric["pods"]["target"]["averageValue"])
        for document in of_kind("HorizontalPodAutoscaler")
        for metric in document["spec"]["metrics"]
        if metric["type"] == "Pods"
    }
    config = (ROOT / "model_repository/alexnet/config.pbtxt").read_text()
    (queue,) = re.findall(r"max_queue_size: (\d+)", config)
    assert targets["alexnet_waiting_crops"] * 4 == SETTINGS.max_waiting_crops
    assert targets["nv_inference_pending_request_count"] * 4 == int(queue)


def test_one_name_and_one_version_for_each_image() -> None:
    images: dict[str, set[str]] = {}
    for path in KUBERNETES.rglob("kustomization.yaml"):
        for image in documents(path)[0].get("images", []):
            images.setdefault(image["name"], set()).add(image["newTag"])
    for service in documents(DEPLOY / "compose.yaml")[0]["services"].values():
        name, _, tag = service["image"].rpartition(":")
        images.setdefault(name, set()).add(tag)
    for file in (*DEPLOY.glob("*.Dockerfile"), DEPLOY / "README.md"):
        for name, tag in re.findall(r"(alexnet-\w+|\S*/tritonserver):([\w.]+(?:-py3)?)", file.read_text()):
            images.setdefault(name, set()).add(tag)
    assert set(images) == {
        "alexnet-gateway", "alexnet-scorer", "alexnet-trainer", "nvcr.io/nvidia/tritonserver"
    }
    for name, tags in images.items():
        assert len(tags) == 1, f"{name} has the tags {tags}"
        if name.startswith("alexnet-"):
            assert tags == {PROJECT["version"]}
    used = {container(name)["image"] for name in pods()}
    assert used <= set(images), "an image that no kustomization gives a tag"


# --- what Triton is started with -----------------------------------------------------------------


def test_tritonserver_knows_every_flag(triton_installed: None) -> None:
    made = environment()
    variables = os.environ | made.variables
    done = subprocess.run(
        [str(made.server), "--help"], env=variables, capture_output=True, text=True, check=False
    )
    known = set(re.findall(r"^\s*--([a-z0-9-]+)", done.stdout + done.stderr, re.MULTILINE))
    compose = documents(DEPLOY / "compose.yaml")[0]["services"]["triton"]["command"]
    for args in (container("triton")["args"], compose):
        assert args[0] == "tritonserver"
        assert len(args) > 8 and {*flags(args)} <= known


def test_with_the_clusters_flags_whoever_has_no_key_asks_models_and_loads_none(
    triton_installed: None, tmp_path: Path
) -> None:
    """The flags that this server has a use for, on a real one."""
    args = [arg.replace("$(ADMIN_KEY)", "secret") for arg in container("triton")["args"]]
    kept = [arg for arg in args if re.match(r"--grpc-(restricted|max|http2)", arg)]
    assert len(kept) == 4
    given = flags(args)
    # Over HTTP not tried here: LocalTriton itself looks at the repository that way.
    assert given["grpc-restricted-protocol"] == given["http-restricted-api"]
    with LocalTriton(triton_repository(tmp_path), arguments=kept) as server:
        assert infer(server.grpc, random_crops(10, seed=1)).shape == (10, 10)
        with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
            with pytest.raises(InferenceServerException, match=r"(?i)restricted"):
                client.load_model("alexnet")
            client.load_model("alexnet", headers={"triton-grpc-protocol-admin-key": "secret"})
        for path in ("ready", "live"):
            ask(server.http, f"v2/health/{path}")
        asked = {container("triton")[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness")}
        assert asked == {"/v2/health/ready", "/v2/health/live"}


def test_the_gateway_may_ping_as_often_as_it_does() -> None:
    allowed_ms = int(flags(container("triton")["args"])["grpc-http2-min-recv-ping-interval-without-data"])
    assert allowed_ms <= 1000 * SETTINGS.triton_keepalive_s


# --- ends ----------------------------------------------------------------------------------------


def test_a_pod_is_given_the_time_that_its_requests_may_take() -> None:
    def grace(name: str, before: float) -> float:
        return float(pods()[name]["spec"]["terminationGracePeriodSeconds"]) - before

    given = flags(container("triton")["args"])
    drain_delay_s = float(_variables("gateway")["ALEXNET_DRAIN_DELAY_S"])
    assert drain_delay_s >= 5, "the time in which load balancers forget a pod"
    assert grace("gateway", drain_delay_s) > SETTINGS.request_timeout_s + 2  # serving.server, the second port
    asleep_s = container("triton")["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert grace("triton", asleep_s) > int(given["exit-timeout-secs"]) >= SETTINGS.request_timeout_s
    assert int(given["grpc-max-connection-age-grace"]) > 1000 * SETTINGS.request_timeout_s
    for service in documents(DEPLOY / "compose.yaml")[0]["services"].values():
        assert int(service["stop_grace_period"].removesuffix("s")) > SETTINGS.request_timeout_s + 1


# --- confined ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gateway", "triton", "score"])
def test_a_pod_is_restricted(name: str) -> None:
    """Kubernetes' own `restricted` standard, a read-only root, limits, and no token it has no use for."""
    spec, only = pods()[name]["spec"], container(name)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert all({"emptyDir", "persistentVolumeClaim"} & set(volume) for volume in spec["volumes"])
    for amounts in (only["resources"]["requests"], only["resources"]["limits"]):
        assert {"cpu", "memory", "ephemeral-storage"} <= set(amounts)


def test_compose_publishes_on_loopback_and_writes_nowhere() -> None:
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    assert set(services) == {"triton", "gateway", "embedded"}
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        assert all(volume.endswith(":ro") for volume in service.get("volumes", []))


