"""A server of tiny models inside a test: no socket, no file. Plain functions for any test."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import httpx
import numpy as np
from mcruntime.preprocess import Preprocessing
from mcruntime.server.app import App
from mcruntime.server.models import Model, Models
from mcruntime.server.options import ServerOptions
from mcruntime.server.tensors import ModelSpec
from tiny_onnx import LABELS, expected_logits, some_images

HOW = Preprocessing(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", crop_pct=1.0)


def model_of(infer=expected_logits, name="tiny", version="1", *, size=8, how=HOW, max_queue=64, max_batch=4, **about):
    """A loaded version; ``infer`` is its engine."""
    spec = ModelSpec(name, "image", (3, size, size), "logits", len(LABELS), 8, version=version, labels=LABELS)
    return Model(spec, infer, how, max_batch=max_batch, max_queue=max_queue, about=about)


def constant(value):
    """An engine that answers one number, so that an answer tells who gave it."""
    return lambda images: np.full((len(images), len(LABELS)), value, np.float32)


class Gate:
    """An engine that answers when the gate is opened; ``entered`` counts its runs."""

    def __init__(self, infer=expected_logits):
        self._infer, self._open, self.entered = infer, threading.Event(), threading.Semaphore(0)

    def __call__(self, images):
        self.entered.release()
        assert self._open.wait(20)
        return self._infer(images)

    def open(self):
        self._open.set()


@contextlib.contextmanager
def app_of(*models, options=None, split=None, pick=None, sources=lambda: (), **more):
    """An application around loaded models, closed at the end."""
    collection = Models(sources, split=split, **({"pick": pick} if pick else {}))
    for model in models:
        collection.add(model)
    app = App(collection, options or ServerOptions(), **more)
    try:
        yield app
    finally:
        app.close()
        collection.close()


@contextlib.asynccontextmanager
async def client_of(app):
    """An HTTP client whose requests go straight into the application."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


def call(app, method, path, **options):
    """One request from a loop of its own."""

    async def one():
        async with client_of(app) as client:
            return await client.request(method, path, **options)

    return asyncio.run(one())


async def until(condition):
    """Wait for something that other tasks or threads bring about."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def busy_and_waiting(client, gate, model, num_waiting, path="/v2/models/tiny/infer"):
    """Requests of which the engine holds the first while the others wait; their tasks."""
    tasks = [asyncio.create_task(client.post(path, json=infer_request()))]
    await asyncio.to_thread(gate.entered.acquire, timeout=20)
    tasks += [asyncio.create_task(client.post(path, json=infer_request())) for _ in range(num_waiting)]
    await until(lambda: model.batcher.num_waiting == num_waiting)
    return tasks


def finish(shadows):
    """Wait until every copy was compared, then close."""
    for shadow in shadows.all:
        shadow.model.batcher.close()
        assert shadow.model.batcher.join(20)
    shadows.close()


def infer_request(images=None, **changes):
    """The JSON of an inference request."""
    images = some_images(1) if images is None else images
    tensor = {"name": "image", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return {"inputs": [tensor | changes]}


def logits_of(response):
    """What was answered, [B, N]."""
    assert response.status_code == 200, response.text
    (output,) = response.json()["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])
