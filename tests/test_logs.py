"""Log lines as machines and as people read them."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import gateway
from support import encoded, picture, tiny_repository
from test_stopping import until

from serving.logs import HEAD, JsonLines, TextLines


def record(message: str = "said %s", *values: object, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("alexnet.access", logging.INFO, "here.py", 1, message, values or ("so",), None)
    if fields:
        made.fields = fields
    return made


def test_a_json_line_holds_time_level_logger_message_and_the_fields() -> None:
    made = record("said %s", "so", status=200, ms={"total": 1.5})
    line = json.loads(JsonLines().format(made))
    moment = datetime.fromisoformat(line.pop("time"))
    assert moment.tzinfo == UTC and abs(moment.timestamp() - made.created) < 0.0011
    assert line == {
        "level": "info",
        "logger": "alexnet.access",
        "message": "said so",
        "status": 200,
        "ms": {"total": 1.5},
    }


def test_a_text_line_holds_the_fields_behind_the_message() -> None:
    line = TextLines(HEAD).format(record(status=200, path="/x", cut_off=True, ms={"read": 0.5, "total": 2.0}))
    assert line.endswith("INFO said so status=200 path=/x cut_off=true ms.read=0.5 ms.total=2.0")


def test_without_fields_a_text_line_is_the_usual_one() -> None:
    made = record()
    assert TextLines(HEAD).format(made) == logging.Formatter(HEAD).format(made)


@given(st.text(st.characters(), max_size=40))
def test_nothing_in_a_field_can_begin_a_line_or_look_like_another_field(text: str) -> None:
    as_json, as_text = (each.format(record(path=text, status=404)) for each in (JsonLines(), TextLines(HEAD)))
    for line in (as_json, as_text):
        assert line.isascii() and len(line.splitlines()) == 1
    assert json.loads(as_json)["path"] == text
    told = as_text.partition(" path=")[2].removesuffix(" status=404")
    assert (json.loads(told) if told.startswith('"') else told) == text


def test_an_exception_stays_in_its_json_line_and_follows_the_text_line() -> None:
    made = record()
    try:
        raise ValueError("no\nluck")
    except ValueError:
        made.exc_info = sys.exc_info()
    line = JsonLines().format(made)
    assert "\n" not in line and "ValueError: no\nluck" in json.loads(line)["exception"]
    assert TextLines(HEAD).format(made).splitlines()[1].startswith("Traceback")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository(tmp_path_factory.mktemp("repository"))


def test_every_line_of_a_gateway_that_logs_json_is_json(repository: Path) -> None:
    """The server's own complaints too, which uvicorn would write in its own way."""
    with gateway(repository, log_format="json", log_level="debug") as server:
        headers = {"content-type": "image/jpeg"}
        sent = httpx.post(f"{server.url}/classify", content=encoded(picture(62)), headers=headers)
        httpx.get(f"{server.url}/livez")
        with pytest.raises(httpx.HTTPError):  # too long a header: uvicorn's parser refuses it
            httpx.get(server.url, headers={"x": "\x01"}).raise_for_status()
        until(lambda: any("Invalid HTTP" in line for line in server.log))
        until(lambda: sum("bytes_out" in line for line in server.log) == 2)
        server.terminate()
        assert server.end() == 0
    lines = [json.loads(line) for line in server.log]
    answered, healthy = (line for line in lines if line["logger"] == "alexnet.access")
    assert answered["request_id"] == sent.json()["request_id"] and answered["level"] == "info"
    assert (healthy["path"], healthy["level"]) == ("/livez", "debug")


def test_at_level_warning_a_gateway_tells_what_goes_wrong_alone(repository: Path) -> None:
    with gateway(repository, log_level="warning") as server:
        assert httpx.get(f"{server.url}/models").status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url, headers={"x": "\x01"}).raise_for_status()
        until(lambda: bool(server.log))
        server.terminate()
        assert server.end() == 0
    assert all(" WARNING " in line for line in server.log)
