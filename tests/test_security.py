"""SECURITY.md is true to the code: its tests exist, its settings too, with the defaults that it says."""

from __future__ import annotations

import re

import pytest
from support import ROOT

from serving.settings import Settings

TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", TEXT)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_answers_a_threat_exists(file: str, name: str) -> None:
    assert not name or f"def {name}(" in (ROOT / "tests" / file).read_text()


def test_every_threat_names_what_shows_its_answer() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and line.count("|") == 4]
    threats = [row for row in rows if not re.match(r"\| (threat|setting|`ALEXNET)", row)]
    assert len(threats) >= 25
    assert [row for row in threats if ".py" not in row] == []


def test_its_settings_exist_and_are_off_by_themselves() -> None:
    named = set(re.findall(r"ALEXNET_([A-Z_]+)", TEXT))
    assert {name.lower() for name in named} <= set(Settings.model_fields)
    settings = Settings()
    assert settings.host == settings.ops_host == "127.0.0.1"
    for name in ("api_keys_file", "ops_port", "tls_cert", "cors_origins", "trusted_proxies", "drain_delay_s"):
        assert not getattr(settings, name), name
    assert settings.hsts_max_age_s == 365 * 24 * 3600
