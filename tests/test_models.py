"""Several models side by side: opened when first asked for, once, and named by `model=`."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

import httpx
import pytest
from fake_triton import FakeTriton
from support import LABELS, FakeBackend, encoded, picture, serving, tiny_repository

from commands.wiring import backend_of, others_of
from serving import models as models_module
from serving.backends import Backend
from serving.errors import ModelNotReady, UnknownModel
from serving.models import Models, Others
from serving.settings import Settings
from serving.triton_backend import ready_models


class SlowToStart(FakeBackend):
    """Started when the test says so, or raising what it says."""

    def __init__(self) -> None:
        super().__init__(LABELS[:3])
        self.may_start = asyncio.Event()
        self.fault: Exception | None = None
        self.starts = 0

    async def start(self) -> None:
        self.starts += 1
        await self.may_start.wait()
        if self.fault is not None:
            raise self.fault
        await super().start()


def models_with(other: Backend, name: str = "other") -> tuple[Models, list[str]]:
    """A default, and one other; the names that were opened are noted."""
    opened: list[str] = []

    async def names() -> Collection[str]:
        return [name]

    def open_backend(wanted: str) -> Backend:
        opened.append(wanted)
        return other

    return Models(FakeBackend(), "alexnet", Others(names, open_backend)), opened


def test_all_who_ask_while_a_model_opens_get_the_one_backend_and_leaving_does_not_end_it() -> None:
    async def run() -> None:
        other = SlowToStart()
        models, opened = models_with(other)
        asking = [asyncio.create_task(models.get("other")) for _ in range(5)]
        while not other.starts:
            await asyncio.sleep(0)
        asking[0].cancel()
        assert models.opened("other") is None
        other.may_start.set()
        assert await asyncio.gather(*asking[1:]) == [other] * 4
        assert await models.get("other") is other is models.opened("other")
        assert opened == ["other"] and other.starts == 1
        await models.close()
        assert not other.ready

    asyncio.run(run())


def test_without_a_name_or_with_its_own_the_default_answers_and_nothing_is_opened() -> None:
    async def run() -> None:
        models, opened = models_with(FakeBackend())
        await models.start()
        assert await models.get() is await models.get("alexnet") is models.default
        assert await models.names() == ["alexnet", "other"] and not opened
        with pytest.raises(UnknownModel, match=r"no model 'third' .* 'alexnet', 'other'"):
            await models.get("third")
        await models.close()

    asyncio.run(run())


def test_a_model_that_cannot_be_opened_is_tried_again_after_a_while_and_not_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        other = SlowToStart()
        other.fault = ModelNotReady("damaged")
        other.may_start.set()
        models, opened = models_with(other)
        for _ in range(3):
            with pytest.raises(ModelNotReady, match="damaged"):
                await models.get("other")
        assert opened == ["other"]
        other.fault = None
        monkeypatch.setattr(models_module, "AGAIN_AFTER_S", 0)
        assert await models.get("other") is other
        await models.close()

    asyncio.run(run())


def test_a_model_published_beside_the_served_one_answers_without_a_restart(tmp_path: Path) -> None:
    repository = tiny_repository(tmp_path, seed=1)
    settings = Settings(model_repository=repository, watch_s=0)
    app = serving(settings, backend_of(settings), others_of(settings))
    with app as url, httpx.Client(base_url=url) as client:
        photograph = encoded(picture(5))

        def ask(**query: str) -> httpx.Response:
            kind = {"Content-Type": "image/jpeg"}
            return client.post("/classify", params=query, content=photograph, headers=kind)

        refused = ask(model="mine")
        assert refused.status_code == 404 and "'alexnet'" in refused.json()["detail"]
        tiny_repository(tmp_path, classes=3, name="mine", version=4, seed=2)
        listed = client.get("/models").json()
        assert [(entry["name"], entry["default"], entry["loaded"]) for entry in listed] == [
            ("alexnet", True, True),
            ("mine", False, False),
        ]
        mine, default = ask(model="mine").json(), ask().json()
        assert (mine["model"]["name"], mine["model"]["version"], len(mine["predictions"])) == ("mine", "4", 3)
        assert (default["model"]["name"], default["model"]["version"]) == ("alexnet", "1")
        assert client.get("/models").json()[1]["version"] == "4"
        assert len(client.get("/labels", params={"model": "mine"}).json()) == 3
        assert client.get("/model", params={"model": "mine"}).json()["classes"] == 3
        assert len(client.get("/labels").json()) == 10


@pytest.mark.parametrize("name", ["../alexnet", ".", "alexnet/1", "", "%2e%2e", "\0"])
def test_a_name_that_is_no_model_of_the_repository_is_refused(tmp_path: Path, name: str) -> None:
    settings = Settings(model_repository=tiny_repository(tmp_path), model="alexnet", watch_s=0)

    async def run() -> None:
        models = Models(FakeBackend(), "other", others_of(settings))
        with pytest.raises(UnknownModel):
            await models.get(name)

    asyncio.run(run())


def test_the_setting_names_what_may_be_asked_for(tmp_path: Path) -> None:
    for name in ("alexnet", "secret", "open"):
        tiny_repository(tmp_path, name=name)
    settings = Settings(model_repository=tmp_path, models="alexnet, open", watch_s=0)

    async def run() -> None:
        models = Models(backend_of(settings), "alexnet", others_of(settings))
        await models.start()
        assert await models.names() == ["alexnet", "open"]
        assert (await models.get("open")).model.info.name == "open"
        with pytest.raises(UnknownModel, match="secret"):
            await models.get("secret")
        await models.close()

    asyncio.run(run())


def test_over_triton_the_models_are_those_that_are_ready_there() -> None:
    triton = FakeTriton(name="elsewhere")
    triton.load("8", seed=3)
    triton.start()
    try:
        assert asyncio.run(ready_models(triton.address)) == ["elsewhere"]
    finally:
        triton.stop()
    assert asyncio.run(ready_models(triton.address)) == []
