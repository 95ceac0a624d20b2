"""deploy/'s NetworkPolicies, evaluated as a cluster would: who reaches whom, on which port."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
from manifests import OPS, PORTS, RESOURCES, Document


class Peer(NamedTuple):
    """A pod as policies see it."""

    name: str
    namespace: str = "alexnet"
    labels: Mapping[str, str] = MappingProxyType({})


GATEWAY, TRITON, SCORER = (
    Peer(name, labels={"app.kubernetes.io/name": name}) for name in ("gateway", "triton", "score")
)
STRANGER = Peer("stranger", labels={"app.kubernetes.io/name": "other"})
DNS = Peer("dns", "kube-system", {"k8s-app": "kube-dns"})
PROMETHEUS = Peer("prometheus", "monitoring")
OUTSIDE = Peer("ingress", "ingress-nginx")


def matches(selector: Document, labels: Mapping[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions", []):
        assert each["operator"] == "In"
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


def passes(source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether base's NetworkPolicies let a connection through, at both of its ends."""

    def is_named(entry: Document, peer: Peer) -> bool:
        if "namespaceSelector" in entry:
            if not matches(entry["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace}):
                return False
        elif peer.namespace != "alexnet":
            return False
        return matches(entry.get("podSelector", {}), peer.labels)

    def allowed(at: Peer, direction: str, peers: str, other: Peer) -> bool:
        if at.namespace != "alexnet":
            return True
        policies = [
            each["spec"]
            for _, each in RESOURCES
            if each["kind"] == "NetworkPolicy" and matches(each["spec"]["podSelector"], at.labels)
        ]
        governing = [each for each in policies if direction.title() in each["policyTypes"]]
        return not governing or any(
            {"protocol": protocol, "port": port} in rule["ports"]
            and (peers not in rule or any(is_named(entry, other) for entry in rule[peers]))
            for each in governing
            for rule in each.get(direction, [])
        )

    return allowed(source, "egress", "to", target) and allowed(target, "ingress", "from", source)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (OUTSIDE, GATEWAY, PORTS["gateway"]),
        (PROMETHEUS, GATEWAY, OPS),
        (PROMETHEUS, TRITON, PORTS["metrics"]),
        (GATEWAY, TRITON, PORTS["grpc"]),
        (SCORER, TRITON, PORTS["grpc"]),
        (GATEWAY, DNS, 53),
        (SCORER, DNS, 53),
    ],
    ids=lambda each: each.name if isinstance(each, Peer) else str(each),
)
def test_the_network_lets_through_what_is_needed(source: Peer, target: Peer, port: int) -> None:
    assert passes(source, target, port)
    if target is DNS:
        assert passes(source, target, port, "UDP")


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (OUTSIDE, TRITON, PORTS["grpc"]),
        (OUTSIDE, TRITON, PORTS["http"]),
        (STRANGER, TRITON, PORTS["grpc"]),
        (PROMETHEUS, TRITON, PORTS["grpc"]),
        (GATEWAY, TRITON, PORTS["http"]),
        (SCORER, GATEWAY, PORTS["gateway"]),
        (OUTSIDE, GATEWAY, OPS),
        (STRANGER, GATEWAY, OPS),
        (SCORER, GATEWAY, OPS),
        (TRITON, GATEWAY, PORTS["gateway"]),
        (TRITON, DNS, 53),
        (GATEWAY, OUTSIDE, 443),
    ],
    ids=lambda each: each.name if isinstance(each, Peer) else str(each),
)
def test_the_network_lets_nothing_else_through(source: Peer, target: Peer, port: int) -> None:
    assert not passes(source, target, port)
