"""TLS at the gateway, what it tells browsers, and what of a proxy's word is believed."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme
from processes import Gateway, gateway
from support import FakeBackend, encoded, picture, run_alexnet, tiny_repository
from test_stopping import until

from serving.app import create_app
from serving.certificate import Certificate
from serving.errors import MalformedRequest
from serving.server import uvicorn_config
from serving.settings import Settings

HSTS = "strict-transport-security"


def put(ca: trustme.CA, folder: Path) -> tuple[Path, Path]:
    """A certificate for this machine and its key, in place of those that were there."""
    made = ca.issue_cert("127.0.0.1", "localhost")
    chain, key = folder / "tls.crt", folder / "tls.key"
    made.cert_chain_pems[0].write_to_path(str(chain))
    made.private_key_pem.write_to_path(str(key))
    return chain, key


def trusting(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("tls")
    chain, key = put(ca, folder)
    repository = tiny_repository(folder / "repository")
    with gateway(repository, tls_cert=chain, tls_key=key, ops_port=0, request_timeout_s=1) as server:
        yield server


def test_over_tls_it_answers_and_browsers_are_told_to_stay(server: Gateway, ca: trustme.CA) -> None:
    assert server.url.startswith("https://")
    with httpx.Client(base_url=server.url, verify=trusting(ca)) as client:
        headers = {"content-type": "image/jpeg"}
        for answer in (client.get("/"), client.get("/nope"), client.get("/readyz")):
            assert answer.headers[HSTS] == "max-age=31536000"
        assert client.post("/classify", content=encoded(picture(3)), headers=headers).status_code == 200
    plain = httpx.get(f"{server.ops_url}/livez")
    assert plain.status_code == 200 and HSTS not in plain.headers, "the operators' port is plain"


def test_plain_text_gets_no_answer(server: Gateway) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url.replace("https", "http"))


def test_nothing_older_than_tls_1_2_is_spoken(ca: trustme.CA, tmp_path: Path) -> None:
    chain, key = put(ca, tmp_path)
    app = create_app(Settings(), FakeBackend())
    config = uvicorn_config(app, Settings(), "127.0.0.1", 0, ssl_certfile=chain, ssl_keyfile=key)
    config.load()
    assert config.ssl and config.ssl.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_a_client_that_never_says_goodbye_does_not_hold_up_the_end(ca: trustme.CA, tmp_path: Path) -> None:
    chain, key = put(ca, tmp_path)

    async def held(port: int) -> asyncio.StreamWriter:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(ca))
        return writer

    repository = tiny_repository(tmp_path / "repository")
    with gateway(repository, tls_cert=chain, tls_key=key, request_timeout_s=1) as server:
        loop = asyncio.new_event_loop()
        writer = loop.run_until_complete(held(server.port))  # the loop stands still: nothing is answered
        server.terminate()
        assert server.end(12) == 0
        writer.transport.abort()
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()


# --- renewed -------------------------------------------------------------------------------------


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """The certificate that the client sees, in memory."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    asks = client.wrap_bio(back, there, server_hostname="localhost")
    answers = server.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for side in (asks, answers):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    seen = asks.getpeercert(binary_form=True)
    assert seen
    return seen


def test_a_renewed_certificate_is_taken_up_and_half_a_renewal_is_not(
    ca: trustme.CA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chain, key = put(ca, tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    certificate = Certificate(chain, key)
    first = handshake(context, trusting(ca))

    whole_key = key.read_bytes()
    half = ca.issue_cert("localhost")
    half.cert_chain_pems[0].write_to_path(str(chain))
    for _ in range(3):
        certificate.follow(context)
    assert handshake(context, trusting(ca)) == first
    assert len([record for record in caplog.records if "stays as it was" in record.getMessage()]) == 1

    half.private_key_pem.write_to_path(str(key))
    assert key.read_bytes() != whole_key
    certificate.follow(context)
    renewed = ssl.PEM_cert_to_DER_cert(chain.read_text())
    assert handshake(context, trusting(ca)) == renewed != first
    chain.unlink()
    certificate.follow(context)
    assert handshake(context, trusting(ca)) == renewed


def test_a_running_gateway_follows_its_certificate(ca: trustme.CA, tmp_path: Path) -> None:
    chain, key = put(ca, tmp_path)
    with gateway(tiny_repository(tmp_path / "repository"), tls_cert=chain, tls_key=key) as server:
        address = ("127.0.0.1", server.port)
        assert ssl.get_server_certificate(address) == chain.read_text()
        put(ca, tmp_path)
        until(lambda: ssl.get_server_certificate(address) == chain.read_text(), timeout_s=30)


def test_tls_that_cannot_work_ends_the_start_with_one_line(ca: trustme.CA, tmp_path: Path) -> None:
    chain, key = put(ca, tmp_path)
    for chain_, key_ in ((tmp_path / "absent", key), (key, chain), (chain, tmp_path / "absent")):
        with pytest.raises(MalformedRequest, match="no TLS with"):
            Certificate(chain_, key_)
    done = run_alexnet("serve", "--port", "0", "--tls-cert", chain, "--tls-key", tmp_path / "absent")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    alone = run_alexnet("serve", "--port", "0", "--tls-cert", chain)
    assert alone.returncode == 1 and "go together" in alone.stderr


def test_a_key_behind_a_password_is_refused_and_nobody_is_asked(ca: trustme.CA, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as pem

    chain, key = put(ca, tmp_path)
    loaded = pem.load_pem_private_key(key.read_bytes(), None)
    locked = pem.BestAvailableEncryption(b"secret")
    key.write_bytes(loaded.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, locked))
    with pytest.raises(MalformedRequest, match="no TLS with"):
        Certificate(chain, key)


# --- behind a proxy ------------------------------------------------------------------------------

SAID = [(b"x-forwarded-for", b"6.6.6.6, 203.0.113.9"), (b"x-forwarded-proto", b"https")]


@pytest.mark.parametrize(
    ("trusted", "peer", "client", "scheme"),
    [
        ("", "10.1.2.3", "10.1.2.3", "http"),
        ("", "127.0.0.1", "127.0.0.1", "http"),
        ("10.0.0.0/8", "10.1.2.3", "203.0.113.9", "https"),
        ("10.0.0.0/8, ::1", "::1", "203.0.113.9", "https"),
        ("10.0.0.0/8", "192.168.0.1", "192.168.0.1", "http"),
        ("10.0.0.0/8, 203.0.113.0/24", "10.1.2.3", "6.6.6.6", "https"),
    ],
)
def test_only_a_trusted_proxy_says_who_the_client_is(
    trusted: str, peer: str, client: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last address that no trusted proxy has; what stands before it, the client may have made up."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # uvicorn's own variable must open nothing
    seen = {}

    async def app(scope: dict[str, object], *_: object) -> None:
        seen.update(scope)

    config = uvicorn_config(app, Settings(trusted_proxies=trusted), "127.0.0.1", 0, lifespan="off")
    config.load()
    scope = {"type": "http", "client": (peer, 1), "scheme": "http", "headers": SAID}
    asyncio.run(config.loaded_app(scope, None, None))
    assert seen["client"][0] == client  # type: ignore[index]
    assert seen["scheme"] == scheme


@pytest.mark.parametrize("proxies", ["*", "proxy.example", "10.0.0.1/8", "10.0.0.0/33"])
def test_proxies_that_are_no_addresses_are_refused_at_the_start(proxies: str) -> None:
    with pytest.raises(ValueError, match="trusted_proxies"):
        Settings(trusted_proxies=proxies)
    done = run_alexnet("serve", ALEXNET_TRUSTED_PROXIES=proxies)
    assert done.returncode == 1 and "trusted_proxies" in done.stderr


def test_hsts_is_sent_over_a_trusted_proxy_s_tls_and_can_be_left_out(tmp_path: Path) -> None:
    said = {"x-forwarded-proto": "https"}
    repository = tiny_repository(tmp_path)
    with gateway(repository, trusted_proxies="127.0.0.1", hsts_max_age_s=60) as server:
        assert httpx.get(f"{server.url}/livez", headers=said).headers[HSTS] == "max-age=60"
        assert HSTS not in httpx.get(f"{server.url}/livez").headers
    with gateway(repository, trusted_proxies="127.0.0.1", hsts_max_age_s=0) as server:
        assert HSTS not in httpx.get(f"{server.url}/livez", headers=said).headers
    assert os.environ.get("FORWARDED_ALLOW_IPS") is None
    with gateway(repository) as server:
        assert HSTS not in httpx.get(f"{server.url}/livez", headers=said).headers
