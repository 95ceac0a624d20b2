"""Whom an address stands for, where clients share fairly."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_network
from typing import Final

_SUBSCRIBER_BITS: Final = 64


def client_of(address: str) -> str:
    """An IPv6 address stands for its /64: that is what one subscriber is given, 2**64 addresses in it.

    One that only wraps an IPv4 address (::ffff:192.0.2.1) is that. What is no address stays as it is.
    """
    if ":" not in address:
        return address
    try:
        parsed = IPv6Address(address.partition("%")[0])  # behind it, through which interface
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ip_network((parsed, _SUBSCRIBER_BITS), strict=False))
