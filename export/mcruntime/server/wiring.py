"""Which connections an image opens, for models whose wiring depends on the image: asked by the page, never by clients
in a hurry.

prune-export writes ``wiring.onnx`` beside such a model: images in, the weight of every edge out, proved to agree with
the trained net. It is opened when somebody first asks, runs on one thread, and one image at a time.
"""

# B = batch, E = edges of all stages that depend on the image.
from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mcruntime.bundle import WIRING_MODEL
from mcruntime.engine import OnnxRunner
from mcruntime.server.about import is_as_sealed, read_wiring
from mcruntime.server.errors import DeadlineError, NotFoundError, OverloadedError
from mcruntime.server.images import read_image
from mcruntime.server.models import Model
from mcruntime.server.tensors import Images
from mcruntime.server.web import MODEL, Request, Response, Route, as_json

if TYPE_CHECKING:
    from mcruntime.server.app import App

PATTERN = f"{MODEL}/wiring"
MOST_WAITING = 32  # requests; a picture is no reason to keep a server busy
T = TypeVar("T")
NOT_THERE = "the wiring of this model does not depend on the image, or its bundle cannot tell"


class Watcher:
    """The wiring model of one bundle: opened by the first question, let go with the model it belongs to."""

    def __init__(self, model: Model) -> None:
        self._told = read_wiring(model).get("dynamic") or []
        self._runner: OnnxRunner | None = None
        if self._told and is_as_sealed(model, WIRING_MODEL):
            path = Path(model.folder) / WIRING_MODEL
            self._runner = OnnxRunner(path, threads=1, name=model.spec.name, spinning=False).__enter__()

    def edges(self, images: Images) -> dict[str, Any]:
        """The edges of one image with their weights, 0 where closed, and the nodes that it does not run.

        Args:
            images: [1, C, H, W].

        Raises:
            NotFoundError: there are none.
        """
        if self._runner is None:
            raise NotFoundError(NOT_THERE)
        weights_E = self._runner.infer(images)[0].tolist()
        rows = [
            {"from": edge["from"], "to": edge["to"], "weight": max(0.0, weight)}
            for edge, weight in zip(self._told, weights_E, strict=True)
        ]
        readers = {tuple(row["to"]) for row in rows}
        running = {tuple(row["to"]) for row in rows if row["weight"] > 0}
        return {"edges": rows, "idle": sorted(map(list, readers - running))}


def route(app: App) -> Route:
    """``POST /v2/models/NAME/wiring`` with an image, as for ``/predict``."""
    watchers: weakref.WeakKeyDictionary[Model, Watcher] = weakref.WeakKeyDictionary()
    dynamic: weakref.WeakKeyDictionary[Model, bool] = weakref.WeakKeyDictionary()
    thread = ThreadPoolExecutor(1, thread_name_prefix="wiring")  # one image at a time, whoever still waits for it
    waiting = 0

    def look(model: Model, images: Images) -> dict[str, Any]:
        if model not in watchers:
            watchers[model] = Watcher(model)
        return watchers[model].edges(images)

    async def in_thread(work: Callable[[], T]) -> T:
        """Its outcome; a place is taken until the thread is through, also for a client that has hung up."""
        nonlocal waiting
        if waiting >= MOST_WAITING:
            raise OverloadedError
        waiting += 1
        loop = asyncio.get_running_loop()
        future = thread.submit(work)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(leave))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), app.options.timeout_s)
        except TimeoutError:
            raise DeadlineError from None

    def leave() -> None:
        nonlocal waiting
        waiting -= 1

    async def answer(request: Request) -> Response:
        model = app.models.find(request.args["model"], request.args["version"])
        if model not in dynamic:
            dynamic[model] = await in_thread(lambda: bool(read_wiring(model).get("dynamic")))
        if not dynamic[model]:
            raise NotFoundError(NOT_THERE)
        data, _ = await read_image(request)
        images = await app.decode_image(data, model)
        told = await in_thread(partial(look, model, images))
        return as_json({"model": model.spec.name, "version": model.spec.version, **told})

    return Route(PATTERN, {"POST": answer})
