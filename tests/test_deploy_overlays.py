"""deploy/kubernetes as kustomize composes it: each overlay, and the repository in an object store."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from manifests import KUBERNETES, PORTS, SINCE, Document, documents, flags, named
from support import ROOT

BUILT = ["overlays/cpu", "overlays/gpu", "overlays/local", "jobs/score"]
Render = Callable[[Path], list[Document]]


@pytest.fixture(scope="module")
def kustomize() -> Render:
    """Renders an overlay as a cluster would get it; nothing here speaks to one."""
    command = next(
        (
            words
            for words in (["kustomize", "build"], ["kubectl", "kustomize"])
            if shutil.which(words[0]) is not None
        ),
        None,
    )
    if command is None:
        pytest.skip("neither kustomize nor kubectl is here; the files were checked one by one")

    def render(folder: Path) -> list[Document]:
        done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return render


@pytest.mark.parametrize("built", BUILT)
def test_what_a_cluster_would_get_is_valid(kustomize: Render, built: str) -> None:
    for document in kustomize(KUBERNETES / built):
        kubernetes_validate.validate(document, SINCE, strict=True)
        assert document["kind"] in ("Namespace", "PersistentVolume") or (
            document["metadata"]["namespace"] == "alexnet"
        )


def test_no_deployment_sets_the_replicas_that_an_autoscaler_sets(kustomize: Render) -> None:
    for overlay in ("cpu", "gpu"):
        rendered = kustomize(KUBERNETES / "overlays" / overlay)
        scaled = {
            each["spec"]["scaleTargetRef"]["name"]
            for each in rendered
            if each["kind"] == "HorizontalPodAutoscaler"
        }
        assert scaled == {"gateway", "triton"}
        for each in rendered:
            if each["kind"] == "Deployment":
                assert "replicas" not in each["spec"]


def _triton(rendered: list[Document]) -> Document:
    return dict(named(rendered, "Deployment", "triton")["spec"]["template"]["spec"])


def test_the_gpu_overlay_asks_for_a_gpu_and_serves_the_engine(kustomize: Render) -> None:
    rendered = kustomize(KUBERNETES / "overlays/gpu")
    (server,) = _triton(rendered)["containers"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert [arg for arg in server["args"] if "--load-model" in arg] == [
        "--load-model=alexnet", "--load-model=alexnet_fp16"
    ]
    gateway = named(rendered, "Deployment", "gateway")
    variables = gateway["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "ALEXNET_MODEL", "value": "alexnet_fp16"} in variables


def test_with_an_object_store_there_is_no_volume_and_a_way_out(kustomize: Render, tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    overlay = tmp_path / "kubernetes/overlays/cpu/kustomization.yaml"
    as_it_is = overlay.read_text()
    with_store = as_it_is.replace("# - ../../components/object-store", "- ../../components/object-store")
    assert with_store != as_it_is
    overlay.write_text(with_store)
    rendered = kustomize(overlay.parent)
    for document in rendered:
        kubernetes_validate.validate(document, SINCE, strict=True)
    assert "PersistentVolumeClaim" not in {each["kind"] for each in rendered}
    spec = _triton(rendered)
    assert [volume["name"] for volume in spec["volumes"]] == ["tmp"]
    (server,) = spec["containers"]
    assert flags(server["args"])["model-repository"] == "$(MODEL_REPOSITORY)"
    (config,) = (each for each in rendered if each["kind"] == "ConfigMap")
    assert config["data"]["MODEL_REPOSITORY"].startswith("s3://")
    assert {"configMapRef": {"name": config["metadata"]["name"]}} in server["envFrom"]
    policy = named(rendered, "NetworkPolicy", "triton")
    assert "Egress" in policy["spec"]["policyTypes"]
    assert any({"protocol": "TCP", "port": 443} in rule["ports"] for rule in policy["spec"]["egress"])


def test_with_api_keys_the_gateway_reads_them_as_it_wants_them(kustomize: Render, tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    overlay = tmp_path / "kubernetes/overlays/cpu/kustomization.yaml"
    with_keys = overlay.read_text().replace("# - ../../components/api-keys", "- ../../components/api-keys")
    assert with_keys != overlay.read_text()
    overlay.write_text(with_keys)
    rendered = kustomize(overlay.parent)
    for document in rendered:
        kubernetes_validate.validate(document, SINCE, strict=True)
    spec = named(rendered, "Deployment", "gateway")["spec"]["template"]["spec"]
    (server,) = spec["containers"]
    variables = {each["name"]: each.get("value") for each in server["env"]}
    (mount,) = (each for each in server["volumeMounts"] if each["name"] == "keys")
    assert Path(variables["ALEXNET_API_KEYS_FILE"]).parent == Path(mount["mountPath"])
    assert "subPath" not in mount
    (volume,) = (each for each in spec["volumes"] if each["name"] == "keys")
    assert volume["secret"] == {"secretName": "gateway-keys", "defaultMode": 0o440}
    assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsGroup"]


def test_locally_the_service_is_where_the_gateways_port_is(kustomize: Render) -> None:
    rendered = kustomize(KUBERNETES / "overlays/local")
    service = named(rendered, "Service", "gateway")
    (port,) = service["spec"]["ports"]
    (mapping,) = documents(KUBERNETES / "overlays/local/kind.yaml")[0]["nodes"][0]["extraPortMappings"]
    assert mapping["containerPort"] == port["nodePort"] and mapping["hostPort"] == PORTS["gateway"]
    (mount,) = documents(KUBERNETES / "overlays/local/kind.yaml")[0]["nodes"][0]["extraMounts"]
    (volume,) = (each for each in rendered if each["kind"] == "PersistentVolume")
    assert volume["spec"]["hostPath"]["path"] == mount["containerPath"]
    assert (ROOT / mount["hostPath"]).is_dir()
    (secret,) = (each for each in rendered if each["kind"] == "Secret")
    (server,) = _triton(rendered)["containers"]
    assert server["env"][0]["valueFrom"]["secretKeyRef"]["name"] == secret["metadata"]["name"]
    assert {each["spec"]["replicas"] for each in rendered if each["kind"] == "Deployment"} == {1}
