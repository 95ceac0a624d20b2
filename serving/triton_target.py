"""`HOST:PORT[,HOST:PORT...]` as the one target name of a gRPC channel."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Final

_SERVER: Final = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>\d{1,5})")


def grpc_target(servers: str) -> str:
    """What gRPC resolves; raises ValueError with the address that cannot be used.

    Several servers are IP addresses of one kind, or one DNS name with all their addresses: gRPC
    takes no list of names, and one looked up here would never learn that an address has changed.
    """
    found = [_parse(server.strip()) for server in servers.split(",")]
    kinds = {kind for kind, _ in found}
    if len(kinds) > 1:
        raise ValueError(f"{servers!r}: several servers are all IPv4 or all IPv6 addresses")
    (kind,) = kinds
    if kind != "dns":
        return f"{kind}:{','.join(address for _, address in found)}"
    if len(found) == 1:
        return f"dns:///{found[0][1]}"
    raise ValueError(f"{servers!r}: give several servers as IP addresses, or one name that has all of them")


def each_server(servers: str) -> list[str]:
    """'a:8001, b:8001' -> ['a:8001', 'b:8001']; raises ValueError with the one that is no HOST:PORT."""
    found = [server.strip() for server in servers.split(",")]
    for server in found:
        _parse(server)
    return found


def addresses(server: str) -> list[str]:
    """HOST:PORT of every server behind a name, IPv4 where it has any; raises OSError for an unknown one.

    A name may stand for many replicas, and what one of them is told the others do not know.
    """
    kind, address = _parse(server)
    if kind != "dns":
        return [address]
    host, _, port = address.rpartition(":")
    found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    v4 = sorted({f"{place[0]}:{port}" for family, *_, place in found if family == socket.AF_INET})
    return v4 or sorted({f"[{place[0]}]:{port}" for _, *_, place in found})


def _parse(server: str) -> tuple[str, str]:
    """'10.0.0.7:8001' -> ('ipv4', '10.0.0.7:8001'); a name is of the kind 'dns', but localhost IPv4."""
    match = _SERVER.fullmatch(server)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ValueError(f"{server!r} is no HOST:PORT; Triton's gRPC port is 8001 unless set otherwise")
    port = match["port"]
    if match["v6"]:
        return "ipv6", f"[{ipaddress.IPv6Address(match['v6'])}]:{port}"
    host = "127.0.0.1" if match["host"] == "localhost" else match["host"]
    try:
        return "ipv4", f"{ipaddress.IPv4Address(host)}:{port}"
    except ValueError:
        return "dns", f"{host}:{port}"
