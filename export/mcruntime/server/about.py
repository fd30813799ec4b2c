"""What the page tells of a model: what was removed from it and why, how exact and how fast it is, and its wiring.

All of it is read from the bundle's own files, each of which is held against the manifest that was loaded. What a bundle
does not say is left out. No path goes out, neither of this machine nor of the one where the model was trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mcruntime.bundle import CERTIFICATE, WIRING, read_manifest
from mcruntime.errors import BundleError
from mcruntime.manifest import Manifest
from mcruntime.server.models import Model

MACHINE = ("cpu", "gpu", "cores usable")  # of what a bench says of its machine
Place = tuple[int, int]  # stage, node; node 0 is what the stage receives, node i its i-th block


def about(model: Model) -> dict[str, Any]:
    """Everything about one version of a model, as plain data. Reads files; not for the event loop."""
    spec = model.spec
    facts: dict[str, Any] = {
        "name": spec.name,
        "version": spec.version,
        "input": {"name": spec.input_name, "shape": list(spec.shape)},
        "output": {"name": spec.output_name, "classes": spec.num_classes},
        "limits": {"images_in_request": spec.max_batch_size, "images_in_batch": model.batcher.max_batch},
        "served": dict(model.about),
    }
    manifest = _manifest_of(model)
    if manifest is None:
        return {**facts, "bundle": None, "certificate": None, "wiring": None}
    folder = Path(model.folder)
    certificate = _read(folder, manifest, CERTIFICATE)
    return {
        **facts,
        "bundle": _bundle(manifest),
        "certificate": _certificate(certificate),
        "wiring": _wiring(certificate, _read(folder, manifest, WIRING)),
    }


def read_wiring(model: Model) -> dict[str, Any]:
    """The bundle's ``wiring.json``; empty where it has none."""
    manifest = _manifest_of(model)
    return {} if manifest is None else _read(Path(model.folder), manifest, WIRING)


def is_as_sealed(model: Model, name: str) -> bool:
    """Whether a file of the bundle is there, and byte for byte what was sealed."""
    manifest = _manifest_of(model)
    if manifest is None or name not in manifest.files:
        return False
    try:
        return hashlib.sha256((Path(model.folder) / name).read_bytes()).hexdigest() == manifest.files[name].sha256
    except OSError:
        return False


def _manifest_of(model: Model) -> Manifest | None:
    """The manifest that the model was loaded with; None if there is none, or another one is in its place by now."""
    if model.folder is None:
        return None
    try:
        manifest = read_manifest(Path(model.folder))
    except BundleError:
        return None
    return manifest if manifest.id == model.about.get("bundle") else None


def _read(folder: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    """A JSON file of the bundle; empty unless it is the very one that was sealed, and an object."""
    fact = manifest.files.get(name)
    if fact is None:
        return {}
    try:
        data = (folder / name).read_bytes()
        tree = json.loads(data) if hashlib.sha256(data).hexdigest() == fact.sha256 else None
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _bundle(manifest: Manifest) -> dict[str, Any]:
    recipe = manifest.recipe
    return {
        "id": manifest.id,
        "created": manifest.created,
        "backbone": _text(recipe, "model", "backbone"),
        "connectivity": _text(recipe, "connectivity", "rule"),
        "preprocessing": manifest.preprocessing.model_dump(mode="json"),
        "models": {
            key: {
                "precision": model.precision,
                "backend": model.backend,
                "opset": model.opset,
                "bytes": sum(fact.bytes for name, fact in manifest.files.items() if name.startswith(model.file)),
                "accuracy": model.accuracy,
            }
            for key, model in manifest.models.items()
        },
        "params": manifest.params.model_dump(),
        "macs": manifest.macs.model_dump(),
        "accuracy": manifest.accuracy.model_dump(),
        "parity": [row.model_dump() for row in manifest.parity],
        "latency": [
            {
                **row.model_dump(exclude={"machine"}),
                "machine": {key: row.machine[key] for key in MACHINE if key in row.machine},
            }
            for row in manifest.latency
        ],
        "licences": manifest.licences.model_dump(),
    }


def _text(tree: Mapping[str, Any], *keys: str) -> str | None:
    """A text inside nested objects, if it is there and no path."""
    found: Any = tree
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, str) and "/" not in found and "\\" not in found else None


def _certificate(tree: Mapping[str, Any]) -> dict[str, Any] | None:
    removed, checks = tree.get("removed"), tree.get("checks")
    if not isinstance(removed, Mapping):
        return None
    return {
        "removed": {str(reason): list(names) for reason, names in removed.items() if isinstance(names, list)},
        "checks": checks if isinstance(checks, list) else [],
        "calibration": tree.get("calibration"),
    }


# --------------------------------------------------------------------------------------------------------- the wiring


def _wiring(certificate: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any] | None:
    """Stages, nodes and edges, ready to be drawn; None where the bundle has no blocks to show."""
    topology = more.get("topology") or certificate.get("topology")
    try:
        return _as_picture(topology, more) if topology and topology["stages"] else None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None


def _as_picture(topology: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    edges, outputs = list(_edges(topology)), [(s, len(row["blocks"])) for s, row in enumerate(topology["stages"])]
    candidates = more.get("candidates")
    offered = list(_edges(candidates)) if candidates else []
    cut = sorted(set(offered) - set(edges))
    gates = dict(_values(candidates, more.get("gates") or {})) if candidates else {}
    dynamic = {(tuple(row["from"]), tuple(row["to"])): row["share"] for row in more.get("dynamic") or []}
    live = _live(edges, outputs)

    def drawn(edge: tuple[Place, Place], state: str) -> dict[str, Any]:
        source, reader = edge
        told: dict[str, Any] = {"from": list(source), "to": list(reader), "state": state}
        if edge in gates:
            told["gate"] = gates[edge]
        if edge in dynamic:
            told["share"] = dynamic[edge]
        return told

    return {
        "stages": [
            {
                "name": row["name"],
                "nodes": [{"name": "input", "live": (s, 0) in live}]
                + [{"name": name, "live": (s, i) in live} for i, name in enumerate(row["blocks"], start=1)],
            }
            for s, row in enumerate(topology["stages"])
        ],
        "edges": [drawn(edge, "cut") for edge in cut]
        + [drawn(edge, "live" if edge[1] in live else "dead") for edge in edges],
        "aggregate": topology.get("aggregate", "mean"),
        "knows_candidates": bool(candidates),
        "per_image": bool(dynamic),
    }


def _edges(topology: Mapping[str, Any]) -> Iterator[tuple[Place, Place]]:
    """What is read, and who reads it."""
    for s, stage in enumerate(topology["stages"]):
        for i, sources in enumerate(stage["reads"], start=1):
            for source in sources:
                yield _place(s, source), (s, i)


def _place(stage: int, source: int | str) -> Place:
    """A source as the certificate writes it: an index in the same stage, or "stage:index"."""
    if isinstance(source, int):
        return stage, source
    other, _, index = source.partition(":")
    return int(other), int(index)


def _values(candidates: Mapping[str, Any], rows: Mapping[str, Any]) -> Iterator[tuple[tuple[Place, Place], float]]:
    """Learned numbers by edge; of blocks that had a choice."""
    for s, stage in enumerate(candidates["stages"]):
        for i, (sources, row) in enumerate(zip(stage["reads"], rows.get(stage["name"], ()), strict=False), start=1):
            if len(sources) == len(row) and min(row, default=1.0) < 1:
                yield from (((_place(s, source), (s, i)), value) for source, value in zip(sources, row, strict=True))


def _live(edges: Iterable[tuple[Place, Place]], outputs: Iterable[Place]) -> set[Place]:
    """The nodes that a stage's output depends on, backwards from there."""
    sources: dict[Place, list[Place]] = {}
    for source, reader in edges:
        sources.setdefault(reader, []).append(source)
    live: set[Place] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend(sources.get(node, ()))
    return live
