"""What ``manifest.json`` says: a bundle's typed, strict description. ``bundle`` reads it and checks the files."""

# B = batch, C = channels, H/W = height/width.
from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mcruntime.preprocess import Preprocessing

SCHEMA_VERSION = 1

Fraction = Annotated[float, Field(ge=0, le=1)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Total = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
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
    """One comparison that ``verify`` made after one hop."""

    hop: str  # e.g. "compile", "onnx"
    batch: Count
    images: str  # their kind, e.g. "validation", "noise"
    max_abs: Measure  # largest difference of a logit
    cosine: Annotated[float, Field(ge=-1.000001, le=1.000001)]  # smallest over the images
    top1_agreement: Fraction
    passed: bool


class SelfTest(Section):
    """What a runner must answer before it may serve."""

    file: FileName = "selftest.npz"
    max_abs: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # largest difference over the largest |logit|


class Manifest(Section):
    """What a bundle is. ``seal`` fills in ``created`` and ``files``."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # also the model's name on the server
    created: Annotated[str, Field(pattern=r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)?$")] = ""  # UTC
    files: dict[FileName, FileFact] = {}  # every file but the manifest
    model: FileName = "model.onnx"
    input: ModelInput
    output: ModelOutput
    opset: Count
    labels: tuple[str, ...]  # of class 0, 1, ...
    preprocessing: Preprocessing
    parents: dict[str, Sha256]  # recipe, checkpoint, ...: what this was made from
    versions: dict[str, str]
    accuracy: Accuracy = Accuracy()
    params: Change
    macs: Change  # multiply-accumulates of one image
    parity: Annotated[tuple[Parity, ...], Field(min_length=1)]
    selftest: SelfTest
    seeds: dict[str, int]

    @model_validator(mode="after")
    def _parts_agree(self) -> Manifest:
        if len(self.labels) != self.output.num_classes:
            raise ValueError(f"{len(self.labels)} labels for {self.output.num_classes} classes")
        if self.input.shape[1:] != (self.preprocessing.image_size,) * 2 or self.input.shape[0] != 3:
            size = self.preprocessing.image_size
            raise ValueError(f"input.shape is {list(self.input.shape)}, but images are made as [3, {size}, {size}]")
        return self

    @property
    def id(self) -> str:
        """sha256 of all of it but ``created``: the same content has the same id, whenever it was sealed."""
        tree = self.model_dump(mode="json", exclude={"created"})
        text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
