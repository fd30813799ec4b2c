"""Shadow traffic: another bundle gets copies of the requests, and its answers are compared with those that were sent.

A copy is made after the answer was written, runs in a batcher, queue and thread of the shadow's own, and is dropped
when there is no room; nobody waits for it and no client ever sees its answer. What the two still share is the CPU: the
shadow's engine gets one thread, and every copy is a whole inference. Where that is too much, copy a share of them.

SIGHUP reads a bundle again that has changed. It becomes another shadow, whose counts begin at nothing: what is known of
one bundle says nothing about the next.
"""

# B = batch, C = channels, H/W = height/width, N = classes.
from __future__ import annotations

import asyncio
import copy
import logging
import random
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from mcruntime.errors import InputError, McdeployError
from mcruntime.server.batcher import Answer, Closed, Outcome
from mcruntime.server.errors import OverloadedError
from mcruntime.server.loader import describe, parse_target, source_of
from mcruntime.server.models import Model, Models, Source
from mcruntime.server.options import ServerOptions
from mcruntime.server.statistics import Statistics
from mcruntime.server.tensors import Images, Logits

# Upper bounds of the histogram of relative differences: float32 noise, fp16, int8, another model.
DIFFERENCE_BOUNDS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 5e-2, 1e-1, 5e-1, 1.0)
MAX_WAITING_BYTES = 64 << 20  # of images that wait for one shadow
logger = logging.getLogger("mcruntime.server")


@dataclass
class Comparison:
    """What came of the copies of one version's requests; totals since the start."""

    mirrored: int = 0  # requests
    dropped: int = 0  # requests
    failed: int = 0  # requests
    images: int = 0  # compared
    disagreements: int = 0  # images
    worst: float = 0.0
    total: float = 0.0  # of the requests' differences
    differences: list[int] = field(default_factory=lambda: [0] * (len(DIFFERENCE_BOUNDS) + 1))


@dataclass(frozen=True)
class ShadowSource:
    """Where a shadow is read from.

    Attributes:
        text: as the user wrote it: ``[NAME[:VERSION]=]FOLDER[@MODEL]``.
        version: of the served model; "": all.
    """

    text: str
    name: str  # "": the bundle's own
    version: str
    source: Source


class Shadow:
    """One bundle beside a served model.

    Args:
        model: the shadow, loaded.
        name: of the model whose requests are copied.
        version: of the only version whose requests are copied; "": of all.
        source: where it is read from, to be read again; None: from nowhere.
        stamp: of the files it was read from.

    Attributes:
        id: the start of its bundle's id, and which of the bundle's models it is.
    """

    def __init__(
        self, model: Model, name: str, version: str = "", source: ShadowSource | None = None, stamp: str = ""
    ) -> None:
        self.model = model
        self.name = name
        self.version = version
        self.source = source
        self.stamp = stamp
        self.id = "@".join([str(model.about.get("bundle", ""))[:12], str(model.about.get("model", ""))])
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._seen: dict[str, Comparison] = {}

    @property
    def statistics(self) -> Statistics:
        """Of the shadow's own runs."""
        return self.model.statistics

    def wants(self, model: Model) -> bool:
        """Whether it gets copies of this model's requests."""
        return model.spec.name == self.name and self.version in ("", model.spec.version)

    def fits(self, model: Model) -> bool:
        """Whether the images of this model's requests are prepared as the shadow's must be."""
        return model.spec.shape == self.model.spec.shape and model.preprocessing == self.model.preprocessing

    def offer(self, version: str, images: Images, reference: Logits) -> None:
        """Take a copy of a request, or drop it; returns at once.

        Args:
            version: that answered.
            images: [B, C, H, W]; kept until the shadow has answered, so not to be changed.
            reference: [B, N], what was answered.
        """
        with self._lock:
            seen = self._seen.setdefault(version, Comparison())
            fits = images.shape[1:] == self.model.spec.shape and reference.shape[1] == self.model.spec.num_classes
            fits = fits and bool(np.isfinite(reference).all())  # what infinity differs by is no number
            if not fits or self._waiting_bytes + images.nbytes > MAX_WAITING_BYTES:
                seen.dropped += 1
                return
            self._waiting_bytes += images.nbytes
            seen.mirrored += 1
        try:
            self.model.batcher.submit(images, partial(self._compare, seen, images.nbytes, reference))
        except (OverloadedError, Closed):
            with self._lock:
                self._waiting_bytes -= images.nbytes
                seen.mirrored -= 1
                seen.dropped += 1

    def drop(self, version: str) -> None:
        """Count a request that is not copied."""
        with self._lock:
            self._seen.setdefault(version, Comparison()).dropped += 1

    def snapshot(self) -> dict[str, Comparison]:
        """A consistent copy, by the version whose answers are the reference."""
        with self._lock:
            return copy.deepcopy(self._seen)

    def _compare(self, seen: Comparison, num_bytes: int, reference: Logits, outcome: Outcome) -> None:
        """In the shadow's thread."""
        answer = outcome.logits if isinstance(outcome, Answer) else None
        if answer is not None and (answer.shape != reference.shape or not np.isfinite(answer).all()):
            answer = None
        difference = 0.0 if answer is None else relative_difference(answer, reference)
        others = 0 if answer is None else int((answer.argmax(axis=1) != reference.argmax(axis=1)).sum())
        with self._lock:
            self._waiting_bytes -= num_bytes
            if answer is None:
                seen.failed += 1
                return
            seen.images += len(answer)
            seen.disagreements += others
            seen.worst = max(seen.worst, difference)
            seen.total += difference
            seen.differences[bisect_left(DIFFERENCE_BOUNDS, difference)] += 1


class Shadows:
    """All shadows, and which requests they get.

    Args:
        share: of the requests that are copied, 0..1.
        pick: a random number in [0, 1).
    """

    def __init__(
        self, shadows: Sequence[Shadow], share: float = 1.0, pick: Callable[[], float] = random.random
    ) -> None:
        self.all = list(shadows)
        self._share = share
        self._pick = pick
        self._reloading = asyncio.Lock()

    def mirror(self, model: Model, images: Images, answer: Answer) -> None:
        """``App.mirror``: copy a request to the shadows of the model that answered, when the answer is on its way."""
        mine = [shadow for shadow in self.all if shadow.wants(model)]
        if not mine or (self._share < 1 and self._pick() >= self._share):
            return
        # The handler writes the answer before it lets go of the loop; the copies come after.
        loop = asyncio.get_running_loop()
        for shadow in mine:
            # A version that was loaded anew may prepare its images otherwise than when the shadow was checked.
            if shadow.fits(model):
                loop.call_soon(shadow.offer, model.spec.version, images, answer.logits)
            else:
                shadow.drop(model.spec.version)

    async def reload(self, models: Models) -> None:
        """Read the bundles again that have changed. One that is not as it should be is logged; the old one stays."""
        async with self._reloading:
            for before in list(self.all):
                source = before.source
                if source is None:
                    continue
                try:
                    fresh = await asyncio.to_thread(_open_changed, source, before.stamp, models, self.all)
                except Exception as error:  # also one that is our bug or the disk's
                    known = isinstance(error, McdeployError)
                    logger.error("the shadow stays as it was: %s", error, exc_info=not known)
                    continue
                if fresh is not None:
                    self.all = [fresh if shadow is before else shadow for shadow in self.all]
                    logger.info("shadow of %s: %s", fresh.name, describe(fresh.model))
                    await asyncio.to_thread(_let_go, [before])

    def close(self) -> None:
        """Drop the copies that wait, and let the engines go when they are through with their batch. Blocks."""
        _let_go(self.all)


def relative_difference(answer: Logits, reference: Logits) -> float:
    """The largest difference of two answers [B, N], each row's over the largest logit of its reference."""
    scale = np.maximum(np.abs(reference).max(axis=1), np.finfo(np.float32).tiny)
    return float((np.abs(answer.astype(np.float64) - reference).max(axis=1) / scale).max())


def open_shadows(texts: Sequence[str], models: Models, options: ServerOptions) -> Shadows:
    """Load and prove the shadows, each as ``[NAME[:VERSION]=]FOLDER[@MODEL]``, printing a line for each.

    NAME is the served model whose requests are copied, VERSION the only version of it. Without NAME it is the model of
    the bundle's own name.

    Raises:
        InputError: no such model is served, or it takes other images or has other classes; one bundle twice.
        BundleError, BackendError, ParityError: a bundle that is damaged, cannot run here, or fails its self-test.
    """
    shadows = Shadows([], options.shadow_share)
    try:
        for text in texts:
            shadow = _open(_source_of(text, options), models, shadows.all)
            shadows.all.append(shadow)
            whom = f"{shadow.name} version {shadow.version}" if shadow.version else shadow.name
            print(f"shadow of {whom}: {describe(shadow.model)}", flush=True)
    except BaseException:
        shadows.close()
        raise
    return shadows


def _let_go(shadows: Sequence[Shadow]) -> None:
    for shadow in shadows:
        shadow.model.batcher.close()
        shadow.model.batcher.expire(float("inf"))
    for shadow in shadows:
        shadow.model.close()


def _source_of(text: str, options: ServerOptions) -> ShadowSource:
    target = parse_target(text, version="")
    # One thread: copies must not take the cores from the requests themselves.
    source = source_of(replace(target, version=target.version or "1"), replace(options, threads=1))
    return ShadowSource(text, target.name, target.version, source)


def _open_changed(source: ShadowSource, stamp: str, models: Models, others: Sequence[Shadow]) -> Shadow | None:
    """The shadow anew; None: its files are those it was read from."""
    if source.source.stamp() == stamp:
        return None
    return _open(source, models, [other for other in others if other.source is not source])


def _open(source: ShadowSource, models: Models, others: Sequence[Shadow]) -> Shadow:
    text, stamp = source.text, source.source.stamp()  # before: what changes meanwhile is read again the next time
    model = source.source.load()
    try:
        name = source.name or model.spec.name
        _check(text, model, name, source.version, models)
        shadow = Shadow(model, name, source.version, source, stamp)
        if any((name, shadow.id) == (other.name, other.id) for other in others):
            raise InputError(f"shadow {text}: this bundle shadows {name!r} already; leave one of them away")
        return shadow
    except BaseException:
        model.close()
        raise


def _check(text: str, shadow: Model, name: str, version: str, models: Models) -> None:
    served = [models.find(name, number) for number in models.versions(name) if version in ("", number)]
    if not served:
        what = f"{name!r} version {version}" if version else repr(name)
        raise InputError(f"shadow {text}: no model {what} is served; say whose requests it gets: NAME[:VERSION]=FOLDER")
    for model in served:
        if (model.spec.shape, model.spec.num_classes) != (shadow.spec.shape, shadow.spec.num_classes):
            raise InputError(
                f"shadow {text}: takes images {shadow.spec.shape} and has {shadow.spec.num_classes} classes, but "
                f"{name!r} takes {model.spec.shape} and has {model.spec.num_classes}; they cannot be compared"
            )
        if model.preprocessing != shadow.preprocessing:
            raise InputError(
                f"shadow {text}: prepares images in another way than {name!r}, whose prepared images it would get; "
                "they cannot be compared"
            )
        if model.spec.labels != shadow.spec.labels and model.spec.labels and shadow.spec.labels:
            raise InputError(f"shadow {text}: its classes have other names than those of {name!r}")
