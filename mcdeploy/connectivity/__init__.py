"""Who reads whom, and how a model learns it: one rule a file, all of them by name in ``RULES``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mcdeploy.connectivity import fixed, maskconnect
from mcdeploy.connectivity.wiring import Sources, Wired

RULES: dict[str, Callable[[tuple[Sources, ...], Any], Wired]] = {
    "chain": fixed.chain,
    "all": fixed.all_sources,
    "random": fixed.random,
    "maskconnect": maskconnect.maskconnect,
}
