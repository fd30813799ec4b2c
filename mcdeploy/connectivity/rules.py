"""All rules by name. A rule takes what every block may read and returns what it reads and what joins it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mcdeploy.connectivity import fixed, maskconnect
from mcdeploy.connectivity.stages import Stage
from mcdeploy.connectivity.wiring import Sources, Wired

RULES: dict[str, Callable[[tuple[Stage, ...], tuple[Sources, ...], Any], Wired]] = {
    "chain": fixed.chain,
    "all": fixed.all_sources,
    "random": fixed.random,
    "drop": fixed.drop,
    "maskconnect": maskconnect.maskconnect,
}
