"""Whom an address stands for: one subscriber's many addresses are one client."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.clients import client_of


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_all_of_a_64_is_one_client_and_another_64_another(prefix: int, one: int, other: int) -> None:
    if prefix == 0:
        return  # where IPv4 is wrapped
    first, second = (str(IPv6Address((prefix << 64) | host)) for host in (one, other))
    assert client_of(first) == client_of(second)
    assert IPv6Address(first) in ip_network(client_of(first))
    assert client_of(str(IPv6Address(((prefix ^ 1 or 2) << 64) | one))) != client_of(first)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_itself_also_when_wrapped(address: IPv4Address) -> None:
    assert client_of(str(address)) == client_of(f"::ffff:{address}") == str(address)


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("unix:", "unix:"),
        ("proxy", "proxy"),
    ],
)
def test_of_each_kind_one(address: str, client: str) -> None:
    assert client_of(address) == client
