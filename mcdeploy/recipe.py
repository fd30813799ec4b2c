"""A recipe: one YAML file, whole, flat and strict, that says how a served model comes about.

Whole: no includes and no inheritance. Flat: two levels, section and key. Strict: an unknown key, a wrong type or an
impossible combination is an error that names the file, the key and the nearest valid key. Every section is a small
frozen model; the function that does the work takes its section and never the whole recipe.
"""

from __future__ import annotations

import difflib
import functools
import json
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from mcdeploy.connectivity.fixed import ChainConfig
from mcdeploy.connectivity.rules import RULES
from mcdeploy.errors import RecipeError
from mcdeploy.section import Count, Finite, Fraction, NotNegative, Positive, RuleConfig, Section


class DataConfig(Section):
    """Where images come from and how they are prepared."""

    source: Literal["digits", "folder", "timm"] = "digits"
    root: str | None = None  # folder: holds train/<class>/* and val/<class>/*; timm: where its data set lies
    dataset: str | None = None  # timm: the name create_dataset takes, e.g. "torch/cifar10"
    image_size: Count = 32  # height and width in pixels
    mean: tuple[Finite, Finite, Finite] = (0.485, 0.456, 0.406)  # of pixels scaled to 0..1
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0  # evaluation: resize to image_size / crop_pct, crop the centre
    crop: Literal["none", "pad4", "random-resized"] = "none"  # training
    hflip: Fraction = 0.0
    color_jitter: NotNegative = 0.0
    auto_augment: str | None = None  # timm's policy string, e.g. "rand-m9-mstd0.5"
    random_erase: Fraction = 0.0
    mixup: NotNegative = 0.0  # alpha of timm's Mixup
    cutmix: NotNegative = 0.0
    images_per_epoch: Count | None = None  # draw only this many training images an epoch, anew each epoch
    in_memory: bool | None = None  # hold decoded images; None: when they fit in 2 GiB
    workers: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> DataConfig:
        if self.source == "folder" and self.root is None:
            raise ValueError("source: folder needs root, the folder that holds train/ and val/")
        if self.source == "timm" and self.dataset is None:
            raise ValueError('source: timm needs dataset, a name such as "torch/cifar10"')
        if self.source != "timm" and self.dataset is not None:
            raise ValueError(f"dataset is only for source: timm, not for source: {self.source}")
        if self.source == "digits" and self.root is not None:
            raise ValueError("root has no meaning for source: digits, which ships with scikit-learn")
        return self


class ModelConfig(Section):
    """The backbone."""

    backbone: str  # a name timm.create_model knows; the CIFAR nets are registered there
    pretrained: bool = False  # timm's own weights, downloaded by timm
    weights: str | None = None  # a .safetensors file with the backbone's keys
    drop_path: Fraction | None = None  # stochastic depth, for backbones that take drop_path_rate
    options: dict[str, bool | int | float | str | tuple[int, ...] | None] = {}  # more keywords of the backbone

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> ModelConfig:
        if self.pretrained and self.weights:
            raise ValueError("pretrained and weights exclude each other: pick one")
        return self


if TYPE_CHECKING:
    ConnectivityConfig = RuleConfig
else:  # one of the rules' options, told apart by the key ``rule``
    ConnectivityConfig = Annotated[
        functools.reduce(operator.or_, [rule.config for rule in RULES.values()]), Field(discriminator="rule")
    ]


class TrainConfig(Section):
    """The loop."""

    epochs: Count
    joint_epochs: Annotated[int, Field(ge=0)] = 0  # learned wiring: epochs before the gates are frozen
    batch_size: Count = 128  # over all processes
    eval_batch_size: Count = 250
    eval_every: Count = 1  # epochs between evaluations; the last epoch is always evaluated
    optimizer: Literal["sgd", "adamw", "lamb", "rmsprop"] = "sgd"  # timm's create_optimizer_v2
    lr: Positive = 0.1
    momentum: Fraction = 0.9
    weight_decay: NotNegative = 5e-4
    schedule: Literal["cosine", "step", "multistep", "constant"] = "cosine"  # timm's, stepped every update
    warmup_epochs: NotNegative = 0.0
    min_lr: NotNegative = 0.0
    decay_epochs: Count = 30  # step schedule: a tenth every so many epochs
    decay_at: tuple[Count, ...] = ()  # multistep schedule: a tenth at each of these epochs
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_grad: Positive | None = None  # norm
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    distill: Fraction = 0.0  # share of the loss that follows the starting weights' own logits
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False  # torch.compile
    bn_batches: Annotated[int, Field(ge=0)] = 50  # batches that re-estimate BN after freezing

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if self.device == "cpu" and self.precision == "fp16":
            raise ValueError("precision: fp16 needs device: cuda; on a CPU use bf16 or fp32")
        if self.joint_epochs >= self.epochs and self.joint_epochs:
            raise ValueError(
                f"joint_epochs ({self.joint_epochs}) must leave epochs to fine-tune (epochs: {self.epochs})"
            )
        if (self.schedule == "multistep") != bool(self.decay_at):
            raise ValueError("schedule: multistep and decay_at, the epochs at which the rate falls, go together")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be less than epochs ({self.epochs})")
        return self


class ExportConfig(Section):
    """What prune-export makes and how close it must come."""

    backend: Annotated[tuple[Literal["onnx", "tensorrt"], ...], Field(min_length=1)] = ("onnx",)
    precision: Annotated[tuple[Literal["fp32", "fp16", "int8"], ...], Field(min_length=1)] = ("fp32",)
    opset: Annotated[int, Field(ge=18, le=23)] = 20
    batch: tuple[Count, Count, Count] = (1, 8, 32)  # min, opt, max: an engine's profile; what is verified and measured
    # largest |trained - exported| over all logits, relative to the largest |logit|
    max_abs: Positive = 1e-3
    fp16_max_abs: Positive = 0.02
    int8_max_abs: Positive = 0.5  # coarse: what int8 may cost is said by max_accuracy_drop
    min_agreement: Fraction = 0.999  # share of validation images with the same predicted class; fp32 only
    max_accuracy_drop: Fraction = 0.01  # of the exported against the trained net, 0..1; every precision
    # per-image wirings: skip with ONNX If, compute everything, or also cut into N static models
    dynamic: Annotated[str, Field(pattern=r"^(if|masked|static:[1-9][0-9]{0,3})$")] = "if"
    # training images that show the ranges of fp16 and int8, and what really varies in a per-image wiring
    calibration_images: Count = 512
    # of TensorRT engines; the last two make slower engines that also run on a later TensorRT, or on other GPUs
    engine_workspace_mib: Count | None = None  # scratch memory a layer may use; None: all that the GPU has
    engine_optimization: Annotated[int, Field(ge=0, le=5)] = 3  # how long to search for faster kernels
    engine_tf32: bool = False  # fp32 layers may multiply with 10 bits of mantissa
    engine_version_compatible: bool = False
    engine_hardware_compatible: Literal["none", "same-compute-capability", "ampere-plus"] = "none"
    sensitivity: bool = False  # int8: measure every layer, also where the accuracy holds without
    # terms, by SPDX name where there is one: of the trained net, of the weights it started from, of its data
    licence: str | None = None
    licence_weights: str | None = None
    licence_data: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> ExportConfig:
        if not self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise ValueError(f"batch: expected min <= opt <= max, got {list(self.batch)}")
        return self


class Recipe(Section):
    """The whole file. Only ``runs.py`` and this module know it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # of the run, the bundle, and on the server
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataConfig = DataConfig()
    model: ModelConfig
    connectivity: ConnectivityConfig = ChainConfig()
    train: TrainConfig
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _phases_fit_the_rule(self) -> Recipe:
        learned = self.connectivity.has_joint_phase()
        if learned and self.train.joint_epochs == 0:
            raise ValueError(
                f"connectivity.rule: {self.connectivity.rule} needs train.joint_epochs of at least 1 to learn in"
            )
        if not learned and self.train.joint_epochs:
            raise ValueError(
                f"train.joint_epochs is for learned wiring; rule: {self.connectivity.rule} has nothing to learn"
            )
        if getattr(self.connectivity, "warm_up", 0) >= self.train.epochs:
            raise ValueError(f"connectivity.warm_up must be less than train.epochs ({self.train.epochs})")
        if self.export.dynamic != "if" and self.connectivity.rule != "ddw":
            raise ValueError("export.dynamic is for rule: ddw, whose wiring depends on the image")
        if self.train.distill and not (self.model.weights or self.model.pretrained):
            raise ValueError("train.distill follows the starting weights; give model.weights or model.pretrained")
        return self


class _OneOfEachKey(yaml.SafeLoader):
    """YAML lets a key come twice and the last one win; here that is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", key_node.start_mark)
            seen.add(str(key))
        return super().construct_mapping(node, deep)


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply ``a.b=value`` overrides, whose values are YAML.

    Raises:
        RecipeError: no such file, not YAML, or not a valid recipe; names the file, the key and what is near.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _OneOfEachKey)
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot read the recipe ({error.strerror}); 'mcdeploy recipes' lists what ships"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        raise RecipeError(f"{path}:{line} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (name, data, model, ...), got {_kind(tree)}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], where: str) -> Recipe:
    """Check a recipe that is already a mapping; ``where`` opens every message.

    Raises:
        RecipeError: see ``load_recipe``.
    """
    try:
        text = json.dumps(tree, default=str)
    except (ValueError, RecursionError):
        raise RecipeError(f"{where}: an anchor of the YAML file refers to itself") from None
    try:
        return Recipe.model_validate_json(text)  # JSON mode: lists become tuples, and everything else stays strict
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error, tree)}") from None


def parse_connectivity(rule: str, **options: Any) -> ConnectivityConfig:
    """Check a rule's options when they come from Python instead of a file.

    Raises:
        RecipeError: unknown rule or option, or a value out of range.
    """

    class Holder(Section):
        connectivity: ConnectivityConfig

    tree = {"connectivity": {"rule": rule, **options}}
    try:
        return Holder.model_validate_json(json.dumps(tree, default=str)).connectivity
    except ValidationError as error:
        raise RecipeError(f"wire: {_explain(error, tree)}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: expected section.key=value, such as train.epochs=3")
    *sections, last = key.split(".")
    for section in sections:
        below = tree.setdefault(section, {})
        if not isinstance(below, dict):
            raise RecipeError(f"--set {override}: {section} is a value, not a section")
        tree = below
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: {text!r} is not a YAML value") from None


def _explain(error: ValidationError, tree: Any) -> str:
    """The first problem of a pydantic error as one sentence with key, found value, and the nearest valid key."""
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")  # a typo explains the rest
    path = [str(part) for i, part in enumerate(problem["loc"]) if not (i == 1 and part in RULES)]
    key = ".".join(path)
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {key}{_nearest(path, problem['loc'])}"
        case "missing":
            return f"missing key {key}"
        case "union_tag_invalid":
            return f"{key}.rule: unknown rule {problem['ctx']['tag']!r}; valid are {problem['ctx']['expected_tags']}"
        case "union_tag_not_found":
            return f"missing key {key}.rule"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
        case "float_type" if isinstance(problem["input"], str):
            hint = " (YAML 1.1 reads 1e-3 as text; write 1.0e-3)" if "e" in problem["input"].lower() else ""
            return f"{key}: expected a number, got the text {problem['input']!r}{hint}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{key}: {message}, got {_kind(problem['input'])} {problem['input']!r}"


def _nearest(path: list[str], loc: tuple[int | str, ...]) -> str:
    keys = sorted(_keys_of(path[:-1], loc))
    near = difflib.get_close_matches(path[-1], keys, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else f"; valid keys: {', '.join(keys)}"


def _keys_of(section: list[str], loc: tuple[int | str, ...]) -> set[str]:
    if not section:
        return set(Recipe.model_fields)
    if section[0] == "connectivity":
        return set(RULES[str(loc[1])].config.model_fields)
    sections: dict[str, type[Section]] = {
        "data": DataConfig, "model": ModelConfig, "train": TrainConfig, "export": ExportConfig,
    }  # fmt: skip
    return set(sections[section[0]].model_fields) if section[0] in sections else set()


def _kind(value: Any) -> str:
    return {"NoneType": "nothing", "str": "text", "dict": "mapping"}.get(type(value).__name__, type(value).__name__)
