"""`HOST:PORT[,HOST:PORT...]` as the one target name of a gRPC channel."""

from __future__ import annotations

import ipaddress
import re
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
