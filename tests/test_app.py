"""The gateway over HTTP, as a client sees it: a real uvicorn, a fake engine."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from support import LABELS, FakeBackend, encoded, picture

from serving.contract import VIEWS, Crops
from serving.errors import PROBLEMS, ServingError
from serving.preprocess import prepare

Serve = Callable[..., AbstractContextManager[str]]
JPEG = {"content-type": "image/jpeg"}


@pytest.fixture
def client(live_server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live_server, timeout=20) as client:
        yield client


def upload(client: httpx.Client, data: bytes, **params: object) -> httpx.Response:
    return client.post("/classify", files={"file": ("photo.jpg", data)}, params=params)  # type: ignore[arg-type]


def assert_problem(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert set(body) == {"type", "title", "status", "detail", "request_id"}
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    for word in words:
        assert word in body["detail"]


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize(("crops", "count"), [("ten", 10), ("center", 1)])
def test_an_upload_is_answered_with_the_mean_of_its_crops(
    client: httpx.Client, backend: FakeBackend, crops: str, count: int, squares: bool
) -> None:
    backend.takes_squares = squares
    data = encoded(picture(1))
    body = upload(client, data, crops=crops).json()

    expected = backend.probabilities(prepare(data, Crops(crops))).mean(axis=0)
    order = np.argsort(-expected)[:5]
    assert [p["index"] for p in body["predictions"]] == order.tolist()
    assert [p["label"] for p in body["predictions"]] == [LABELS[i].name for i in order]
    assert [p["wnid"] for p in body["predictions"]] == [LABELS[i].wnid for i in order]
    np.testing.assert_allclose([p["probability"] for p in body["predictions"]], expected[order], rtol=1e-5)
    assert body["crops"] == count
    assert body["degraded"] is False
    assert body["model"] == {"name": "alexnet", "version": "7", "precision": "fp32", "backend": "fake"}
    assert body["views"] is None
    stages = body["timing_ms"]
    assert list(stages) == ["read", "decode", "queue", "infer", "post", "total"]
    assert sum(ms for stage, ms in stages.items() if stage != "total") <= stages["total"] + 0.1
    (given,) = backend.batches
    assert given.shape[:2] == ((1, 256) if squares and crops == "ten" else (count, 224))


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("by_setting", [True, False])
@pytest.mark.parametrize(("margin", "count"), [(0.0, 2), (1.0, 10)])
def test_auto_sees_ten_crops_only_where_the_centre_and_its_mirror_do_not_settle_it(
    serve: Serve, backend: FakeBackend, margin: float, count: int, by_setting: bool, squares: bool
) -> None:
    backend.takes_squares = squares
    data = encoded(picture(21))
    backend.provenance["auto"] = {"margin": 1 - margin if by_setting else margin}
    given = {"auto_margin": margin} if by_setting else {}
    each = backend.probabilities(prepare(data, Crops.TEN))
    expected = each.mean(axis=0) if count == 10 else each[[4, 9]].mean(axis=0)
    with serve(backend, **given) as url, httpx.Client(base_url=url) as client:
        body = upload(client, data, crops="auto", detail=True, top=1).json()
    assert body["crops"] == count
    second = [] if count == 2 else [(1, 256)] if squares else [(8, 224)]
    assert [batch.shape[:2] for batch in backend.batches] == [(2, 224), *second]
    assert body["predictions"][0]["index"] == expected.argmax()
    assert body["predictions"][0]["probability"] == pytest.approx(float(expected.max()), rel=1e-5)
    seen = [(view["position"], view["mirrored"]) for view in body["views"]]
    assert seen == (list(VIEWS) if count == 10 else [("centre", False), ("centre", True)])
    winner = body["predictions"][0]["index"]
    for view, row in zip(body["views"], each if count == 10 else each[[4, 9]], strict=True):
        said = {p["index"]: p["probability"] for p in view["predictions"]}
        assert said[winner] == pytest.approx(float(row[winner]), rel=1e-5)


def test_an_auto_answer_comes_from_one_version_even_if_the_model_is_reloaded_in_between(
    serve: Serve,
) -> None:
    data = encoded(picture(21))
    backend = FakeBackend(before=lambda: backend.reload("8", seed=8) if len(backend.batches) == 1 else None)
    with serve(backend, auto_margin=1.0) as url, httpx.Client(base_url=url) as client:
        body = upload(client, data, crops="auto", top=10).json()
    expected = backend.probabilities(prepare(data, Crops.TEN)).mean(axis=0)  # of version 8
    assert [len(batch) for batch in backend.batches] == [2, 8, 10]
    assert body["model"]["version"] == "8"
    said = {p["index"]: p["probability"] for p in body["predictions"]}
    np.testing.assert_allclose([said[index] for index in range(10)], expected, rtol=1e-4)


def test_an_answer_names_the_version_that_gave_it_not_the_one_loaded_since(serve: Serve) -> None:
    backend = FakeBackend()
    original = backend.infer

    async def reloaded_in_flight(*arguments: object) -> object:
        answer = await original(*arguments)  # type: ignore[arg-type]
        backend.reload("8", seed=8)
        return answer

    backend.infer = reloaded_in_flight  # type: ignore[assignment, method-assign]
    with serve(backend) as url, httpx.Client(base_url=url) as client:
        assert upload(client, encoded(picture(22))).json()["model"]["version"] == "7"
        assert client.get("/model").json()["version"] == "8"


def test_the_engine_is_told_the_request_s_deadline(serve: Serve) -> None:
    backend = FakeBackend()
    with serve(backend, request_timeout_s=7.0) as url, httpx.Client(base_url=url) as client:
        before = time.monotonic()  # the clock of asyncio's loops, and of uvloop's to the millisecond
        upload(client, encoded(picture(23)))
    (deadline_s,) = backend.deadlines
    assert deadline_s is not None
    assert before + 6.9 < deadline_s < time.monotonic() + 7.1


def test_a_raw_body_and_a_multipart_field_get_the_same_answer(client: httpx.Client) -> None:
    data = encoded(picture(2))
    raw = client.post("/classify", content=data, headers=JPEG).json()
    assert raw["predictions"] == upload(client, data).json()["predictions"]


def test_ten_crops_are_the_default_and_top_limits_the_labels(client: httpx.Client) -> None:
    body = upload(client, encoded(picture(3)), top=2).json()
    assert (body["crops"], len(body["predictions"])) == (10, 2)


def test_top_beyond_the_classes_gives_them_all(client: httpx.Client) -> None:
    predictions = upload(client, encoded(picture(3)), top=1000).json()["predictions"]
    assert len(predictions) == 10
    assert sum(p["probability"] for p in predictions) == pytest.approx(1, abs=1e-5)


def test_detail_tells_what_each_crop_said_on_its_own(client: httpx.Client, backend: FakeBackend) -> None:
    data = encoded(picture(4))
    body = upload(client, data, detail=True, top=1).json()
    each = backend.probabilities(prepare(data, Crops.TEN))
    winner = body["predictions"][0]["index"]
    assert [(v["position"], v["mirrored"]) for v in body["views"]] == [
        (position, mirrored)
        for mirrored in (False, True)
        for position in ("top left", "top right", "bottom left", "bottom right", "centre")
    ]
    for view, row in zip(body["views"], each, strict=True):
        said = {p["index"]: p["probability"] for p in view["predictions"]}
        assert view["predictions"][0]["index"] == row.argmax()
        assert said[winner] == pytest.approx(float(row[winner]), rel=1e-5)


def test_a_request_id_is_kept_where_sane_and_made_otherwise(client: httpx.Client) -> None:
    kept = client.get("/livez", headers={"x-request-id": "job-17.a_b"})
    made = client.get("/livez", headers={"x-request-id": "no\tgood <script>"})
    assert kept.headers["x-request-id"] == "job-17.a_b"
    assert len(made.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 422, ["empty"]),
        (b"just some text", 415, ["JPEG", "PNG"]),
        (encoded(picture(5))[:900], 422, ["JPEG", "damaged or incomplete"]),
    ],
    ids=["empty file", "text named .jpg", "truncated JPEG"],
)
def test_a_bad_file_is_a_problem_told_in_words(
    client: httpx.Client, data: bytes, status: int, words: list[str]
) -> None:
    assert_problem(upload(client, data), status, *words)
    assert upload(client, encoded(picture(5))).status_code == 200, "the server goes on"


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(client: httpx.Client) -> None:
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + bytes.fromhex("0000000d49484452")
        + (20000).to_bytes(4, "big") * 2
        + bytes.fromhex("0802000000")
    )
    import zlib

    bomb += zlib.crc32(bomb[12:29]).to_bytes(4, "big") + bytes.fromhex("0000000049444154")
    assert_problem(upload(client, bomb), 413, "50,000,000 pixels")


def test_missing_field_wrong_type_and_unknown_values_are_400_or_415(client: httpx.Client) -> None:
    data = encoded(picture(6))
    assert_problem(client.post("/classify", files={"photo": data}), 400, "'file'")
    assert_problem(client.post("/classify", data={"file": "no file"}, files={"x": b""}), 400, "'file'")
    assert_problem(
        client.post("/classify", content=data, headers={"content-type": "text/plain"}), 415, "text/plain"
    )
    assert_problem(client.post("/classify", content=data), 415, "missing")
    assert_problem(upload(client, data, crops="eleven"), 400, "crops", "'ten'")
    assert_problem(upload(client, data, top=0), 400, "top")
    assert_problem(upload(client, data, top="many"), 400, "top")
    assert_problem(upload(client, data, model="resnet"), 404, "resnet", "alexnet")


def test_a_broken_multipart_body_is_a_400(client: httpx.Client) -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        response = client.post("/classify", content=b"--y\r\nnonsense", headers={"content-type": kind})
        assert_problem(response, 400)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413_before_it_is_parsed(
    serve: Serve, backend: FakeBackend, chunked: bool
) -> None:
    big = bytes(300_000)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(big), 50_000):
            yield big[start : start + 50_000]

    with serve(backend, max_upload_bytes=100_000) as url, httpx.Client(base_url=url) as client:
        content = pieces() if chunked else big
        assert_problem(client.post("/classify", content=content, headers=JPEG), 413, "100,000")
        assert_problem(upload(client, big), 413, "100,000")
        assert upload(client, encoded(picture(7))).status_code == 200
    assert len(backend.batches) == 1


def test_a_200_mb_body_is_answered_413_and_the_server_goes_on(client: httpx.Client) -> None:
    piece = bytes(1_000_000)
    response = client.post(
        "/classify",
        content=(piece for _ in range(200)),
        headers={**JPEG, "content-length": "200000000"},
    )
    assert_problem(response, 413, "200,000,000")
    assert client.get("/livez").status_code == 200


def test_a_full_queue_is_503_with_retry_after_and_livez_stays_200(serve: Serve) -> None:
    release = threading.Event()
    backend = FakeBackend(before=lambda: None)
    original = backend.infer

    async def slow(*arguments: object) -> object:
        import asyncio

        while not release.is_set():
            await asyncio.sleep(0.005)
        return await original(*arguments)  # type: ignore[arg-type]

    backend.infer = slow  # type: ignore[assignment, method-assign]
    data = encoded(picture(8))
    with serve(backend, max_waiting_crops=20) as url, httpx.Client(base_url=url, timeout=20) as client:
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(upload(client, data).status_code))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        while "alexnet_waiting_crops 20.0" not in client.get("/metrics").text:
            assert time.monotonic() < until
        refused = upload(client, data)
        assert_problem(refused, 503, "20 crops")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/livez").status_code == 200
        release.set()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        assert upload(client, data).status_code == 200


def test_an_expired_deadline_is_504(serve: Serve) -> None:
    backend = FakeBackend()
    original = backend.infer

    async def slow(*arguments: object) -> object:
        import asyncio

        await asyncio.sleep(5)
        return await original(*arguments)  # type: ignore[arg-type]

    backend.infer = slow  # type: ignore[assignment, method-assign]
    with serve(backend, request_timeout_s=0.2) as url, httpx.Client(base_url=url) as client:
        assert_problem(upload(client, encoded(picture(9))), 504, "0.2 s")
        assert "alexnet_waiting_crops 0.0" in client.get("/metrics").text


def test_a_model_not_loaded_is_503_everywhere_but_livez(client: httpx.Client, backend: FakeBackend) -> None:
    backend.ready = False
    for response in (
        client.get("/readyz"),
        client.get("/model"),
        client.get("/labels"),
        upload(client, b"x"),
    ):
        assert_problem(response, 503, "not loaded")
        assert response.headers["retry-after"]
    assert client.get("/livez").status_code == 200
    backend.ready = True
    assert client.get("/readyz").json() == {"status": "ready", "model": "alexnet"}


def test_an_unexpected_failure_is_500_without_a_trace(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    def explode() -> None:
        raise RuntimeError("secret /etc/path")

    with serve(FakeBackend(before=explode)) as url, httpx.Client(base_url=url) as client:
        response = upload(client, encoded(picture(10)))
        assert_problem(response, 500, "log")
        assert "secret" not in response.text
        assert client.get("/livez").status_code == 200


def test_labels_and_model_describe_what_is_served(client: httpx.Client) -> None:
    labels = client.get("/labels").json()
    assert labels[5] == {"index": 5, "wnid": "n03394916", "label": "French horn"}
    model = client.get("/model").json()
    assert (model["name"], model["version"], model["classes"], model["default_crops"]) == (
        "alexnet",
        "7",
        10,
        "ten",
    )
    assert model["provenance"]["accuracy"] == {"top1_ten": 0.5}
    assert "JPEG" in model["accepted_formats"]


def test_unknown_routes_and_methods_are_problems(client: httpx.Client) -> None:
    assert_problem(client.get("/nope"), 404)
    assert_problem(client.get("/classify"), 405)
    assert client.head("/livez").status_code == 200


def test_openapi_lists_every_problem_and_both_body_types(client: httpx.Client) -> None:
    classify = client.get("/openapi.json").json()["paths"]["/classify"]["post"]
    assert set(classify["requestBody"]["content"]) == {"multipart/form-data", "image/*"}
    documented = {int(status) for status in classify["responses"]}
    assert {problem.status for problem in PROBLEMS.values()} <= documented


def test_every_leaf_of_the_error_tree_has_a_status() -> None:
    def leaves(kind: type[ServingError]) -> set[type[ServingError]]:
        children = kind.__subclasses__()
        return {leaf for child in children for leaf in leaves(child)} if children else {kind}

    assert leaves(ServingError) == set(PROBLEMS)


def test_metrics_count_answers_and_refusals_by_stage(client: httpx.Client) -> None:
    upload(client, encoded(picture(11)))
    upload(client, b"no image")
    text = client.get("/metrics").text
    assert 'alexnet_answers_total{crops="10",model="alexnet",version="7"} 1.0' in text
    assert 'alexnet_refusals_total{reason="unsupported_format",status="415"} 1.0' in text
    labels = 'crops="10",model="alexnet",stage="infer",version="7"'
    assert f"alexnet_stage_seconds_count{{{labels}}} 1.0" in text
    assert "alexnet_requests_in_flight 0.0" in text
    assert "alexnet_inferences_total 1.0" in text, "none for what is no image"
    upload(client, encoded(picture(11)))
    assert "alexnet_inferences_total 2.0" in client.get("/metrics").text


def test_answers_carry_a_strict_content_security_policy(client: httpx.Client) -> None:
    for path in ("/", "/page/page.js", "/docs", "/docs/assets/swagger-ui-bundle.js", "/labels"):
        response = client.get(path)
        assert response.status_code == 200, path
        assert response.headers["content-security-policy"].startswith("default-src 'none'")
        assert response.headers["x-content-type-options"] == "nosniff"


def test_a_client_that_leaves_in_mid_upload_harms_nobody(live_server: str, client: httpx.Client) -> None:
    address = urlsplit(live_server)
    assert address.hostname and address.port
    leaver = http.client.HTTPConnection(address.hostname, address.port)
    leaver.putrequest("POST", "/classify")
    leaver.putheader("content-type", "image/jpeg")
    leaver.putheader("content-length", "100000")
    leaver.endheaders()
    leaver.send(b"\xff\xd8\xff" + bytes(1000))
    leaver.close()
    assert upload(client, encoded(picture(12))).status_code == 200


def test_thirty_two_clients_at_once_each_get_their_own_answer(serve: Serve, backend: FakeBackend) -> None:
    files = [encoded(picture(seed)) for seed in range(8)]
    expected = [int(backend.probabilities(prepare(f, Crops.TEN)).mean(axis=0).argmax()) for f in files]
    got: dict[int, int] = {}

    def ask(number: int) -> None:
        with httpx.Client(base_url=url, timeout=30) as own:
            got[number] = upload(own, files[number % 8]).json()["predictions"][0]["index"]

    with serve(backend, max_wait_s=30) as url:  # whatever else this machine does
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == {number: expected[number % 8] for number in range(32)}


def test_uploads_stay_in_memory(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("an upload was spooled to disk")

    monkeypatch.setattr(tempfile, "TemporaryFile", forbidden)
    large = encoded(picture(13, 1800, 1500), "PNG")
    assert len(large) > 2_000_000
    assert upload(client, large).status_code == 200


def test_json_numbers_survive_a_round_trip(client: httpx.Client, tmp_path: Path) -> None:
    body = upload(client, encoded(picture(14)), top=10).json()
    assert json.loads(json.dumps(body)) == body
