"""What ``manifest.json`` says: a bundle's typed, strict description. ``bundle`` reads it and checks the files."""

# B = batch, C = channels, H/W = height/width.
from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from mcruntime.preprocess import Preprocessing

SCHEMA_VERSION = 2

Fraction = Annotated[float, Field(ge=0, le=1)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Total = Annotated[int, Field(ge=0)]
Precision = Literal["fp32", "fp16", "int8"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ModelKey = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]  # fp32, fp16, int8, tensorrt-fp16, ...
# Plain names, "/" between folders, no leading dot anywhere: nothing that could leave the folder can be written.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$")]


class Section(BaseModel):
    """What all parts of the manifest share: no unknown keys, no silent conversions, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileFact(Section):
    """What a file must be."""

    sha256: Sha256
    bytes: Total


class ModelInput(Section):
    """The model's only input, float32 [B, C, H, W]."""

    name: str
    shape: tuple[Count, Count, Count]  # C, H, W


class ModelOutput(Section):
    """The model's only output, float32 [B, num_classes]."""

    name: str
    num_classes: Count


class Accuracy(Section):
    """Share of images classified right, 0 to 1, before (trained) and after (exported)."""

    before: Fraction | None = None
    after: Fraction | None = None
    images: Count | None = None  # how many it was measured on


class Change(Section):
    """A count before and after compiling."""

    before: Total
    after: Total


class Parity(Section):
    """One comparison that ``verify`` made after one hop. Differences of logits are relative to the largest |logit|."""

    hop: str  # e.g. "compile", "onnx", "fp16"
    batch: Count
    images: str  # their kind, e.g. "validation", "noise"
    max_abs: Measure  # largest difference
    p99: Measure  # what 99 % of the differences stay within
    cosine: Annotated[float, Field(ge=-1.000001, le=1.000001)]  # smallest over the images
    top1_agreement: Fraction
    passed: bool


class Engine(Section):
    """A TensorRT plan, and the only place where it runs."""

    tensorrt: str  # full version
    gpu: str
    compute_capability: str
    driver: str
    batch: tuple[Count, Count, Count]  # min, opt, max


class ModelFile(Section):
    """One form of the model, as read back from the file, and how exact it is."""

    file: FileName
    backend: Literal["onnx", "tensorrt"] = "onnx"
    precision: Precision
    opset: Count
    ir_version: Count
    nodes: dict[str, dict[str, Total]] = {}  # operator (of an engine: "layers") to the type it computes in to how many
    accuracy: Fraction | None = None  # top-1 on the validation images
    selftest_max_abs: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # as Parity.max_abs, on the self-test's images
    engine: Engine | None = None

    @model_validator(mode="after")
    def _engine_fits_the_backend(self) -> ModelFile:
        if (self.backend == "tensorrt") != (self.engine is not None) or self.file.endswith(".plan") != bool(
            self.engine
        ):
            raise ValueError(f"{self.file}: a TensorRT engine is a .plan that says where it runs, and nothing else is")
        return self


class Latency(Section):
    """What was measured; times in milliseconds. Not part of the bundle's id, since no two runs measure the same."""

    model: str  # a key of ``models``
    provider: str
    threads: Count | None = None
    batch: Count
    p50_ms: Measure
    low_ms: Measure  # 95 % interval of the median
    high_ms: Measure
    images_per_second: Measure
    machine: dict[str, str]  # in words


class Licences(Section):
    """Under which terms things may be used, as far as the recipe says; SPDX names where there are any."""

    model: str | None = None  # of the trained weights in this bundle
    weights: str | None = None  # of the weights that training started from
    data: str | None = None


class Manifest(Section):
    """What a bundle is. ``seal`` fills in ``created`` and ``files``."""

    schema_version: Literal[2] = 2
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # also the model's name on the server
    created: Annotated[str, Field(pattern=r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)?$")] = ""  # UTC
    files: dict[FileName, FileFact] = {}  # every file but the manifest
    models: Annotated[dict[ModelKey, ModelFile], Field(min_length=1)]
    serve: str  # the key of the model that runs unless another one is asked for
    input: ModelInput
    output: ModelOutput
    labels: tuple[str, ...]  # of class 0, 1, ...
    preprocessing: Preprocessing
    parents: dict[str, Sha256]  # recipe, checkpoint, calibration images, ...: what this was made from
    recipe: dict[str, JsonValue] = {}  # whole, as it was trained
    versions: dict[str, str]
    git_commit: Annotated[str, Field(pattern=r"^([0-9a-f]{40}(-dirty)?)?$")] = ""  # of mcdeploy, where it ran from git
    licences: Licences = Licences()
    accuracy: Accuracy = Accuracy()
    params: Change
    macs: Change  # multiply-accumulates of one image
    parity: Annotated[tuple[Parity, ...], Field(min_length=1)]
    selftest: FileName = "selftest.npz"  # what a runner must answer before it may serve
    seeds: dict[str, int]
    latency: tuple[Latency, ...] = ()

    @model_validator(mode="after")
    def _parts_agree(self) -> Manifest:
        if len(self.labels) != self.output.num_classes:
            raise ValueError(f"{len(self.labels)} labels for {self.output.num_classes} classes")
        if self.input.shape[1:] != (self.preprocessing.image_size,) * 2 or self.input.shape[0] != 3:
            size = self.preprocessing.image_size
            raise ValueError(f"input.shape is {list(self.input.shape)}, but images are made as [3, {size}, {size}]")
        for key in (self.serve, *(row.model for row in self.latency)):
            if key not in self.models:
                raise ValueError(f"there is no model {key!r}; there are {', '.join(self.models)}")
        return self

    @property
    def id(self) -> str:
        """sha256 of all but ``created`` and ``latency``: the same content has the same id, whenever it was made."""
        tree = self.model_dump(mode="json", exclude={"created", "latency"})
        text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
