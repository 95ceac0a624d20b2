"""People who upload photographs, and machines that call Triton, for Locust.

    make loadtest                                       a gateway of its own, headless, a report
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000      the same users by hand
        [--images FOLDER] [--triton 127.0.0.1:8001 --triton-model alexnet] [--step-s 12] [--steps 1,2,4,8]

Uploaders send photographs of the sizes that people have, as a form or as a plain body, over kept
connections, and ask mostly for ten crops. Triton's users send the same photographs' crops over gRPC.
The shape adds users until more of them bring no more answers. Each answer's own timings appear as
entries of type `stage`, beside the requests.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Locust patches the standard library when it is imported, so it comes before whatever opens sockets.
from locust import FastHttpUser, User, constant, events, task
from locust.env import Environment

# isort: split
import grpc.experimental.gevent
import numpy as np
from closed_loop import HEADERS, multipart
from photographs import CROPS, from_folder, given_folder, mixed
from ramp import STEPS
from saturation import Saturation, note_stages
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from serving.contract import INPUT_NAME, OUTPUT_NAME, Crops
from serving.preprocess import prepare

# Before any channel is opened: else a call of gRPC's own threads stops every other user.
grpc.experimental.gevent.init_gevent()

PHOTOGRAPHS: list[bytes] = []

__all__ = ["Saturation", "TritonUser", "Uploader"]  # what Locust looks for here


@events.init_command_line_parser.add_listener
def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--images", default="", help="a folder of photographs [default: generated]")
    parser.add_argument("--triton", default="", help="HOST:PORT of a Triton's gRPC; none: no users there")
    parser.add_argument("--triton-model", default="alexnet")
    parser.add_argument("--step-s", type=float, default=12, help="seconds with so many users")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="users, step by step")
    parser.add_argument("--ramp-json", default="", help="file for what each step found")


@events.init.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    given: Any = environment.parsed_options
    folder = given_folder(Path(given.images) if given.images else None)
    PHOTOGRAPHS[:] = from_folder(folder) if folder else mixed()
    if not given.triton:
        environment.user_classes = [each for each in environment.user_classes if each is not TritonUser]


class Uploader(FastHttpUser):
    """Sends the next photograph as soon as it has its answer: a closed loop, over a kept connection."""

    weight = 3
    wait_time = constant(0)
    numbers = count()

    def on_start(self) -> None:
        """Every second user sends forms, the others plain bodies."""
        number = next(self.numbers)
        self.rng, self.form = np.random.default_rng(number), number % 2 == 0

    @task
    def classify(self) -> None:
        """One photograph."""
        crops = str(self.rng.choice(list(CROPS), p=list(CROPS.values())))
        photograph = PHOTOGRAPHS[self.rng.integers(len(PHOTOGRAPHS))]
        body: Any = multipart(photograph) if self.form else photograph
        headers = HEADERS if self.form else {"Content-Type": "image/jpeg"}
        url, name = f"/classify?crops={crops}", f"/classify {crops}"
        with self.client.post(url, data=body, headers=headers, name=name, catch_response=True) as answer:
            if answer.status_code == 200:
                note_stages(self.environment, json.loads(answer.text)["timing_ms"])
            else:
                answer.failure(f"{answer.status_code} {json.loads(answer.text or '{}').get('title', '')}")


class TritonUser(User):
    """Sends ten crops to Triton over gRPC; prepared beforehand, so that Triton's time is what is measured."""

    weight = 1
    wait_time = constant(0)
    numbers = count()
    crops: dict[int, Any] = {}  # noqa: RUF012  shared by all users: each photograph is prepared once

    def on_start(self) -> None:
        """A channel of its own."""
        given: Any = self.environment.parsed_options
        self.rng, self.model = np.random.default_rng(next(self.numbers)), given.triton_model
        self.triton = InferenceServerClient(given.triton)

    def on_stop(self) -> None:
        """Let it go, which closes it. Only once: closed here, it would be closed again when it is collected,
        gRPC would count one channel too few, and the process could hang at its end."""
        del self.triton

    @task
    def infer(self) -> None:
        """One photograph's crops, uint8 [10, 224, 224, 3] -> probabilities [10, classes]."""
        index = int(self.rng.integers(len(PHOTOGRAPHS)))
        if index not in self.crops:
            self.crops[index] = prepare(PHOTOGRAPHS[index], Crops.TEN)
        ten = self.crops[index]
        images = InferInput(INPUT_NAME, list(ten.shape), "UINT8")
        images.set_data_from_numpy(ten)
        failure: Exception | None = None
        began, length = time.perf_counter(), 0
        try:
            outputs = [InferRequestedOutput(OUTPUT_NAME)]
            result = self.triton.infer(self.model, [images], outputs=outputs, client_timeout=30)
            length = result.as_numpy(OUTPUT_NAME).nbytes
        except InferenceServerException as error:
            failure = error
        events.request.fire(
            request_type="gRPC", name=f"{self.model} ten crops", exception=failure, context={},
            response_time=1000 * (time.perf_counter() - began), response_length=length,
        )  # fmt: skip
