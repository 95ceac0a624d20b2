"""The file of API keys: what is kept, what is refused, and that a running gateway follows it."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import run_alexnet

from serving.errors import MalformedRequest
from serving.keys import ApiKey, KeyFile, find, hashed, new_key, read_keys, write_keys


class Clock:
    """A clock that a test turns."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def key_named(name: str, **limits: float) -> tuple[str, ApiKey]:
    secret = new_key()
    return secret, ApiKey(name, hashed(secret.encode()), "2026-11-23", **limits)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def put(path: Path, document: Any, mode: int = 0o600) -> None:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    path.chmod(mode)


# --- keys ----------------------------------------------------------------------------------------


def test_keys_are_long_random_and_never_the_same() -> None:
    keys = {new_key() for _ in range(200)}
    assert len(keys) == 200
    assert all(key.startswith("alexnet_") and len(key) == 8 + 43 and key.isascii() for key in keys)


def test_a_key_is_found_among_others_and_nothing_like_it() -> None:
    pairs = [key_named(f"k{number}") for number in range(5)]
    keys = [key for _, key in pairs]
    for secret, key in pairs:
        assert find(keys, secret.encode()) is key
        for wrong in (secret[:-1], secret + "x", secret.swapcase(), key.sha256, "", secret + "x" * 10_000):
            assert find(keys, wrong.encode()) is None


def test_what_is_written_is_read_again_and_holds_no_key(path: Path) -> None:
    pairs = [key_named("shop", rate=20, burst=40), key_named("lab", rate=0.5), key_named("me")]
    write_keys(path, [key for _, key in pairs])
    assert read_keys(path) == tuple(key for _, key in pairs)
    assert all(secret not in path.read_text() for secret, _ in pairs)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["keys.json"]


# --- a file that cannot be used ------------------------------------------------------------------

GOOD = {"name": "shop", "sha256": "ab" * 32}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("", "line 1 is not JSON"),
        ('{"keys": [}', "not JSON"),
        ([], "keys"),
        ({"keys": {}}, "keys"),
        ({"keys": ["shop"]}, "fields"),
        ({"keys": [{**GOOD, "key": "in plain"}]}, "fields"),
        ({"keys": [{"name": "shop"}]}, "lacks"),
        ({"keys": [{**GOOD, "sha256": "AB" * 32}]}, "64 hexadecimal"),
        ({"keys": [{**GOOD, "sha256": 7}]}, "lacks"),
        ({"keys": [{**GOOD, "name": "two words"}]}, "letters"),
        ({"keys": [{**GOOD, "name": "10.0.0.1"}]}, "letter first"),
        ({"keys": [{**GOOD, "name": "a\nb"}]}, "letters"),
        ({"keys": [{**GOOD, "rate": 0}]}, "above 0"),
        ({"keys": [{**GOOD, "rate": True}]}, "not a number"),
        ('{"keys": [{"name": "shop", "sha256": "%s", "rate": NaN}]}' % ("ab" * 32), "not a number"),
        ({"keys": [{**GOOD, "rate": 5, "burst": 0.5}]}, "at least 1"),
        ({"keys": [{**GOOD, "burst": 5}]}, "needs a rate"),
        ({"keys": [GOOD, {**GOOD, "sha256": "cd" * 32}]}, "name stands there twice"),
        ({"keys": [GOOD, {**GOOD, "name": "lab"}]}, "hash stands there twice"),
    ],
)
def test_what_is_no_file_of_keys_is_told_without_what_it_holds(
    path: Path, document: Any, words: str
) -> None:
    put(path, document)
    with pytest.raises(MalformedRequest, match=words) as told:
        read_keys(path)
    assert str(path) in str(told.value)
    assert "in plain" not in str(told.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o602, 0o666, 0o601])
def test_a_file_that_others_may_use_is_refused(path: Path, mode: int) -> None:
    put(path, {"keys": [GOOD]}, mode)
    with pytest.raises(MalformedRequest, match=f"{mode:04o}.*chmod 600"):
        read_keys(path)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o440])
def test_a_private_file_and_a_mounted_secret_are_fine(path: Path, mode: int) -> None:
    put(path, {"keys": [GOOD]}, mode)
    assert [key.name for key in read_keys(path)] == ["shop"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_refused_and_its_owner_is_kept_in_writing(path: Path) -> None:
    put(path, {"keys": [GOOD]}, 0o640)
    os.chown(path, 4321, 1234)
    with pytest.raises(MalformedRequest, match="user 4321"):
        read_keys(path)
    write_keys(path, [key_named("new")[1]])
    facts = path.stat()
    assert (facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)) == (4321, 1234, 0o640)


def test_neither_a_folder_nor_nothing_is_a_file_of_keys(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(MalformedRequest, match=str(path)):
            read_keys(path)


# --- followed ------------------------------------------------------------------------------------


def test_a_changed_file_counts_from_the_next_look(path: Path) -> None:
    clock = Clock()
    (old, old_key), (new, new_key_) = key_named("old"), key_named("new")
    write_keys(path, [old_key])
    keys = KeyFile(path, look_s=1.0, clock_s=clock)
    write_keys(path, [old_key, new_key_])
    assert keys.find(new.encode()) is None, "not looked yet"
    clock.now_s += 1.0
    assert keys.find(new.encode()) == new_key_
    assert keys.find(old.encode()) == old_key
    write_keys(path, [new_key_])
    clock.now_s += 1.0
    assert keys.find(old.encode()) is None, "revoked"
    assert keys.find(new.encode()) == new_key_


def test_a_broken_or_lost_file_leaves_the_keys_and_is_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    secret, key = key_named("shop")
    write_keys(path, [key])
    keys = KeyFile(path, look_s=1.0, clock_s=clock)

    def broken() -> None:
        put(path, '{"keys": [')

    def readable_by_all() -> None:
        put(path, {"keys": []}, 0o644)

    for spoil in (broken, readable_by_all, path.unlink):
        caplog.clear()
        spoil()
        for _ in range(3):
            clock.now_s += 1.0
            assert keys.find(secret.encode()) == key
        (record,) = caplog.records
        assert record.levelno == logging.ERROR and "stay as they were" in record.getMessage()
    write_keys(path, [])
    clock.now_s += 1.0
    assert keys.find(secret.encode()) is None, "a good file counts again"


def test_a_gateway_that_should_have_doors_does_not_start_without(path: Path) -> None:
    done = run_alexnet("serve", "--port", "0", ALEXNET_API_KEYS_FILE=str(path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert str(path) in line and "No such file" in line


# --- the command ---------------------------------------------------------------------------------


def test_a_key_is_made_shown_once_listed_and_revoked(path: Path) -> None:
    made = run_alexnet("key", "new", "shop", "--rate", "20", "--burst", "40", "--file", path)
    assert made.returncode == 0, made.stderr
    secret = made.stdout.strip()
    assert secret not in made.stderr and secret not in path.read_text()
    (key,) = read_keys(path)
    assert (key.name, key.rate, key.burst, key.sha256) == ("shop", 20.0, 40.0, hashed(secret.encode()))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    listed = run_alexnet("key", "list", ALEXNET_API_KEYS_FILE=str(path))
    assert all(word in listed.stdout for word in ("shop", key.created, "20", "40", key.sha256[:8]))
    assert key.sha256 not in listed.stdout

    assert run_alexnet("key", "revoke", "shop", "--file", path).returncode == 0
    assert read_keys(path) == ()


def test_what_a_key_command_cannot_do_is_one_line_and_changes_nothing(path: Path) -> None:
    write_keys(path, [key_named("shop")[1]])
    before = path.read_bytes()
    for arguments, words in (
        (("new", "shop", "--file", path), "there is a key"),
        (("new", "two words", "--file", path), "letters"),
        (("new", "lab", "--burst", "3", "--file", path), "needs a rate"),
        (("revoke", "nobody", "--file", path), "no key 'nobody'"),
        (("list",), "ALEXNET_API_KEYS_FILE"),
        (("new", "lab", "--file", path.parent / "absent" / "keys.json"), "no folder"),
    ):
        done = run_alexnet("key", *arguments)
        assert done.returncode == 1, arguments
        (line,) = done.stderr.splitlines()
        assert re.search(words, line), line
    assert path.read_bytes() == before


def test_keys_made_at_the_same_time_are_all_kept(path: Path) -> None:
    names = [f"k{number}" for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda name: run_alexnet("key", "new", name, "--file", path), names))
    assert [each.returncode for each in done] == [0] * 4, [each.stderr for each in done]
    assert {key.name for key in read_keys(path)} == set(names)
    assert len({each.stdout for each in done}) == 4
