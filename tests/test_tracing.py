"""Traces: a request's span and its stages, Triton's part of it, and collectors that hang or are not there."""

from __future__ import annotations

import json
import secrets
import socket
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import httpx
import pytest
from fake_triton import fake_triton
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from processes import gateway
from support import FakeBackend, encoded, picture, serving, tiny_repository, triton_repository
from test_stopping import until

from serving.backends import Backend
from serving.errors import EngineFailed
from serving.settings import Settings
from serving.tracing import Traced, Tracing
from serving.trail import wanted
from serving.triton import LocalTriton
from serving.triton_backend import TritonBackend

PHOTO = encoded(picture(47))
JPEG = {"content-type": "image/jpeg"}
STAGES = {"read", "decode", "queue", "infer", "post"}


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@contextmanager
def traced(spans: InMemorySpanExporter, backend: Backend) -> Iterator[httpx.Client]:
    layer = partial(Traced, tracing=Tracing(SimpleSpanProcessor(spans)))
    settings = Settings(port=0, decode_workers=1, pulse_s=0)
    with serving(settings, backend, traced=layer) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client


def ask(client: httpx.Client, **headers: str) -> httpx.Response:
    return client.post("/classify?crops=center", content=PHOTO, headers=JPEG | headers)


def parent() -> tuple[str, str, str]:
    """A client's: the header, its trace and span ids."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return f"00-{trace}-{span}-01", trace, span


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def requests_among(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.kind is SpanKind.SERVER]


def test_a_request_is_a_span_below_the_clients_and_its_stages_lie_within(spans: InMemorySpanExporter) -> None:
    header, trace, above = parent()
    with traced(spans, FakeBackend()) as client:
        answer = ask(client, traceparent=header)
    assert answer.status_code == 200
    (request,) = requests_among(spans)
    assert request.name == "POST /classify"
    assert request.context is not None and request.parent is not None
    assert (trace_of(request), f"{request.parent.span_id:016x}") == (trace, above)
    assert request.attributes is not None
    told = {
        "http.request.method": "POST", "http.route": "/classify", "http.response.status_code": 200,
        "alexnet.model": "alexnet", "alexnet.version": "7", "alexnet.crops": 1, "alexnet.degraded": False,
        "alexnet.request_id": answer.headers["x-request-id"],
    }  # fmt: skip
    assert dict(request.attributes) == told
    below = [span for span in spans.get_finished_spans() if span is not request]
    assert {span.name for span in below} == STAGES
    for span in below:
        assert span.parent is not None and span.parent.span_id == request.context.span_id
        assert request.start_time and span.start_time and span.end_time and request.end_time
        # Both clocks are read anew for each request, some microseconds apart.
        assert request.start_time - 1_000_000 <= span.start_time <= span.end_time
        assert span.end_time <= request.end_time + 1_000_000


def test_a_refusal_tells_its_reason_only_a_failure_is_an_error_and_health_is_no_trace(
    spans: InMemorySpanExporter,
) -> None:
    def fail() -> None:
        raise EngineFailed("on purpose")

    with traced(spans, FakeBackend(before=fail)) as client:
        for path in ("/livez", "/readyz", "/metrics"):
            client.get(path)
        assert client.post("/classify", content=b"text", headers=JPEG).status_code == 415
        assert ask(client).status_code == 502
        assert client.get("/holiday/anna.jpg").status_code == 404
    refused, failed, absent = requests_among(spans)
    assert refused.attributes and failed.attributes
    assert refused.attributes["error.type"] == "unsupported_format"
    assert failed.attributes["error.type"] == "engine_failed"
    assert [span.status.status_code for span in (refused, failed, absent)] == [
        StatusCode.UNSET, StatusCode.ERROR, StatusCode.UNSET,
    ]  # fmt: skip
    assert absent.name == "GET" and "anna" not in absent.to_json()


def test_an_inference_that_fails_is_a_span_with_its_kind_of_error_and_no_words(
    spans: InMemorySpanExporter,
) -> None:
    def fail() -> None:
        raise EngineFailed("10.1.2.3 is gone")

    with traced(spans, FakeBackend(before=fail)) as client:
        assert ask(client).status_code == 502
    (request,) = requests_among(spans)
    below = {span.name: span for span in spans.get_finished_spans() if span is not request}
    assert set(below) == {"read", "decode", "queue", "infer"}
    infer = below["infer"]
    assert infer.status.status_code is StatusCode.ERROR and below["queue"].status.is_unset
    assert infer.attributes == {"error.type": "engine_failed"}
    assert infer.parent is not None and infer.parent == request.context
    assert "10.1.2.3" not in infer.to_json()


def test_triton_is_shown_the_span_of_the_request_that_it_infers_for(spans: InMemorySpanExporter) -> None:
    """Also of one that waited for a place, whose inference the request before it sets off."""
    shown: list[str] = []
    busy, go = threading.Event(), threading.Event()

    def note(context: grpc.ServicerContext) -> None:
        shown.append(str(dict(context.invocation_metadata())["traceparent"]))
        busy.set()
        assert go.wait(20)

    headers = [parent() for _ in range(2)]
    with fake_triton(before=note) as triton:
        backend = TritonBackend(triton.address, "alexnet", concurrency=1)
        with traced(spans, backend) as client:
            first = threading.Thread(target=ask, args=(client,), kwargs={"traceparent": headers[0][0]})
            second = threading.Thread(target=ask, args=(client,), kwargs={"traceparent": headers[1][0]})
            first.start()
            assert busy.wait(20)
            second.start()
            while "alexnet_waiting_crops 2.0" not in client.get("/metrics").text:
                pass
            go.set()
            for thread in (first, second):
                thread.join()
    assert [each.split("-")[1] for each in shown] == [trace for _, trace, _ in headers]
    by_trace = {trace_of(span): span for span in requests_among(spans)}
    for each in shown:
        _, trace, span_id, flags = each.split("-")
        context = by_trace[trace].context
        assert context is not None and (f"{context.span_id:016x}", flags) == (span_id, "01")


def test_what_is_not_sampled_or_not_traced_shows_triton_nothing(spans: InMemorySpanExporter) -> None:
    """Triton traces whatever carries a context."""
    shown: list[str] = []

    def note(context: grpc.ServicerContext) -> None:
        shown.extend(str(name) for name, _ in context.invocation_metadata())

    header = parent()[0]
    with fake_triton(before=note) as triton:
        with traced(spans, TritonBackend(triton.address, "alexnet", concurrency=1)) as client:
            assert ask(client, traceparent=header.removesuffix("01") + "00").status_code == 200
        backend = TritonBackend(triton.address, "alexnet", concurrency=1)
        settings = Settings(port=0, decode_workers=1)
        with serving(settings, backend) as url, httpx.Client(base_url=url, timeout=20) as client:
            assert ask(client, traceparent=header).status_code == 200
    assert shown and "traceparent" not in shown
    assert spans.get_finished_spans() == ()


# --- as a process, with a collector ---------------------------------------------------------------


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Whatever is sent to its URL, parsed."""
    came: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces" and "content-encoding" not in self.headers
            body = self.rfile.read(int(self.headers["content-length"]))
            came.append(parsed(body, is_json="json" in self.headers["content-type"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", came
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def parsed(body: bytes, *, is_json: bool) -> ExportTraceServiceRequest:
    """Triton's exporter writes JSON, with ids in hexadecimal, where protobuf's JSON has base64."""
    if not is_json:
        return ExportTraceServiceRequest.FromString(body)

    def as_protobuf(pairs: list[tuple[str, object]]) -> dict[str, object]:
        ids = ("traceId", "spanId", "parentSpanId")
        return {k: b64encode(bytes.fromhex(str(v))).decode() if k in ids else v for k, v in pairs}

    told = json.loads(body, object_pairs_hook=as_protobuf)
    return json_format.ParseDict(told, ExportTraceServiceRequest(), ignore_unknown_fields=True)


def sent(came: list[ExportTraceServiceRequest]) -> list[Span]:
    return [
        span
        for request in came
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository(tmp_path_factory.mktemp("repository"))


def test_spans_reach_the_collector_of_the_environment_the_last_before_the_process_ends(
    repository: Path,
) -> None:
    header, trace, _ = parent()
    with collector() as (url, came):
        under = ("env", f"OTEL_EXPORTER_OTLP_ENDPOINT={url}", "OTEL_BSP_SCHEDULE_DELAY=60000")
        with gateway(repository, under=under, decode_workers=1) as server:
            with httpx.Client(base_url=server.url, timeout=20) as client:
                assert ask(client, traceparent=header).status_code == 200
            server.terminate()
            assert server.end() == 0
        assert any(f"trace_id={trace}" in line for line in server.log)
    resources = [each for request in came for each in request.resource_spans]
    names = {a.key: a.value.string_value for each in resources for a in each.resource.attributes}
    assert names["service.name"] == "alexnet-serving"
    found = sent(came)
    assert {span.name for span in found} == {"POST /classify", *STAGES}
    assert {span.trace_id.hex() for span in found} == {trace}


def test_a_collector_that_hangs_fails_no_request_and_keeps_no_process_from_ending(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        under = ("env", f"OTEL_EXPORTER_OTLP_ENDPOINT={url}", "OTEL_BSP_SCHEDULE_DELAY=1",
                 "OTEL_BSP_MAX_QUEUE_SIZE=8", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=4")  # fmt: skip
        with gateway(repository, under=under, decode_workers=1) as server:
            with httpx.Client(base_url=server.url, timeout=20) as client:
                answers = [ask(client).status_code for _ in range(20)]  # far more spans than wait
            server.terminate()
            assert server.end() == 0
    assert answers == [200] * 20


def test_without_the_extra_one_line_says_so_and_all_is_served(repository: Path, tmp_path: Path) -> None:
    hidden = "import sys\nsys.modules['opentelemetry.exporter'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    under = ("env", f"PYTHONPATH={tmp_path}", "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:9")
    with gateway(repository, under=under, decode_workers=1) as server:
        with httpx.Client(base_url=server.url, timeout=20) as client:
            assert ask(client).status_code == 200
        server.terminate()
        assert server.end() == 0
    (line,) = [line for line in server.log if "traces" in line]
    assert "opentelemetry" in line and "[otel]" in line
    assert "Traceback" not in "".join(server.log)


@pytest.mark.parametrize("signal", ["", "TRACES_"])
def test_a_protocol_that_is_not_spoken_is_refused_at_the_start_and_the_signals_own_counts_first(
    signal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"OTEL_EXPORTER_OTLP_{signal}PROTOCOL"
    monkeypatch.setenv(name, "grpc")
    with pytest.raises(ValueError, match=f"{name}=grpc.*http/protobuf.*4318"):
        Tracing(SimpleSpanProcessor(InMemorySpanExporter()))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    Tracing(SimpleSpanProcessor(InMemorySpanExporter())).close()


def test_the_standard_variables_turn_it_on_and_off() -> None:
    there = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    assert not wanted({}) and wanted(there)
    assert wanted({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"})
    assert not wanted({"OTEL_EXPORTER_OTLP_ENDPOINT": ""})
    assert not wanted(there | {"OTEL_SDK_DISABLED": "TRUE"})
    assert not wanted(there | {"OTEL_TRACES_EXPORTER": "none"})


def test_the_trace_goes_on_in_a_real_triton(
    triton_installed: None, tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    header, trace, _ = parent()
    with collector() as (url, came):
        told = ("mode=opentelemetry", f"opentelemetry,url={url}/v1/traces", "level=TIMESTAMPS", "count=-1",
                "rate=0", "opentelemetry,bsp_schedule_delay=50")  # fmt: skip
        arguments = [f"--trace-config={setting}" for setting in told]
        with (
            LocalTriton(triton_repository(tmp_path), arguments=arguments) as server,
            traced(spans, TritonBackend(server.grpc, "alexnet", concurrency=1)) as client,
        ):
            def each_has_come() -> bool:
                """Asked again, because a trace can stay with Triton's exporter until the next one comes."""
                assert ask(client).status_code == 200  # a trace of its own
                assert ask(client, traceparent=header).status_code == 200
                return {trace} < {span.trace_id.hex() for span in sent(came) if span.name == "InferRequest"}

            until(each_has_come)
    ours = {(trace_of(span), span.context.span_id) for span in requests_among(spans) if span.context}
    tops = [span for span in sent(came) if span.name == "InferRequest"]
    assert {trace} < {top.trace_id.hex() for top in tops}
    for top in tops:
        assert (top.trace_id.hex(), int(top.parent_span_id.hex(), 16)) in ours, "and no look at the model"
