"""Loaders: from a recipe's data section to batches (images float32 [B, 3, H, W] normalised, labels int64 [B]).

What is evaluated is what is served: validation images go through ``mcruntime.preprocess.prepare`` and nothing else.
Training images have the same resize and centre crop before they are padded, cropped and flipped, except for
``crop: random-resized``, which starts from the whole image.

Every random choice is a function of (seed, epoch, image), so the order of images and what happens to each do not
depend on the number of workers or processes, and an epoch can be repeated bit for bit. The epoch travels to the
workers inside the sampler's keys; nothing needs to be told to a worker that is already running.
"""

# N = images of a split, B = batch, S = image_size (height and width), C = channels.

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from mcruntime.preprocess import DECODE_ERRORS, Preprocessing, prepare
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from timm.data import ImageDataset, IterableImageDataset, Mixup, create_dataset, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from mcdeploy.errors import DataError
from mcdeploy.recipe import DataConfig

MEMORY_LIMIT_BYTES = 2 * 1024**3
PADDING = 4  # pixels on each side for crop: pad4, as in He et al. 2016, section 4.2

DAMAGE = (*DECODE_ERRORS, Image.DecompressionBombError)

Key = tuple[int, int]  # epoch, image
Pixels = npt.NDArray[np.uint8]  # [H, W, 3]


class Source(Protocol):
    """The images of one split, in a fixed order."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call the image in a message: its path where it has one."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image, decoded, in whatever mode it has, and its label.

        Raises:
            ImageError: it cannot be read; the message opens with its name.
        """


@dataclass(frozen=True)
class Loaders:
    """What training and evaluation need to know about the data."""

    train: DataLoader[Any]
    val: DataLoader[Any]
    classes: list[str]
    preprocessing: Preprocessing


def build_loaders(config: DataConfig, batch_size: int, eval_batch_size: int, seed: int) -> Loaders:
    """Open the data set and make its two loaders.

    Args:
        batch_size: training images a step over all processes; smaller when there are fewer images. Incomplete
            training batches are left out.
        seed: fixes the order of the training images and what is done to them; see ``set_epoch``.

    Raises:
        DataError: something is wrong with the data set; names the folder, class or file.
    """
    train_source, val_source, classes = SOURCES[config.source](config)
    preprocessing = Preprocessing(
        image_size=config.image_size,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
    )
    num_drawn = config.images_per_epoch or len(train_source)
    if num_drawn > len(train_source):
        raise DataError(f"data.images_per_epoch: {num_drawn} is more than the {len(train_source)} training images")
    batch_size = min(batch_size, num_drawn)
    if (config.mixup or config.cutmix) and batch_size % 2:
        raise DataError(f"data.mixup and data.cutmix mix images in pairs; a batch of {batch_size} is odd")

    hold = _fits_in_memory(config, train_source, val_source) if config.in_memory is None else config.in_memory
    train = TrainingImages(train_source, config, preprocessing, seed, hold)
    val = EvaluationImages(val_source, preprocessing, hold)
    order = EpochSampler(len(train_source), num_drawn, seed)
    shared: dict[str, Any] = {
        "collate_fn": _as_it_is,
        "num_workers": config.workers,
        "persistent_workers": config.workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
    return Loaders(
        # A generator of their own, so that starting an epoch draws nothing from torch's global one.
        train=DataLoader(
            train,
            batch_sampler=BatchSampler(cast(Any, order), batch_size, drop_last=True),  # its keys are not int
            generator=torch.Generator(),
            **shared,
        ),
        val=DataLoader(val, batch_size=eval_batch_size, generator=torch.Generator(), **shared),
        classes=classes,
        preprocessing=preprocessing,
    )


def plain_training_images(loaders: Loaders, count: int, seed: int) -> Tensor:
    """Training images drawn once, prepared like validation images, so not augmented; [count or all, 3, S, S]."""
    source = cast(TrainingImages, loaders.train.dataset).source
    drawn = _generator(seed, 0, 2).permutation(len(source))[:count]
    return EvaluationImages(source, loaders.preprocessing, hold=False).__getitems__(drawn.tolist())[0]


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Say which epoch the next pass over a training loader is; for the loader itself or as accelerate prepared it."""
    sampler: Any = loader.batch_sampler
    while not isinstance(sampler, EpochSampler):  # accelerate wraps the batch sampler to split its batches
        sampler = getattr(sampler, "batch_sampler", None) or sampler.sampler
    sampler.epoch = epoch


def build_mixup(config: DataConfig, num_classes: int, label_smoothing: float) -> Mixup | None:
    """timm's Mixup for batches of even length, or None when the recipe has neither mixup nor cutmix.

    It draws from numpy's global generator; seed that where runs must agree.
    """
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )


# ---------------------------------------------------------------------------------------------------------- sources


class ImageError(DataError):
    """An image cannot be read. In one sentence even from a worker, whose traceback torch puts before the message."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rstrip().rpartition("ImageError: ")[2])


@dataclass(frozen=True)
class _Arrays:
    pixels_N: npt.NDArray[np.uint8]  # [N, H, W, 3]
    labels_N: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels_N)

    def name(self, index: int) -> str:
        return f"digit {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels_N[index]), int(self.labels_N[index])


@dataclass(frozen=True)
class _Files:
    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> tuple[Image.Image, int]:
        return _open_image(self.paths[index], self.paths[index]), self.labels[index]


@dataclass(frozen=True)
class _TimmSet:
    dataset: Any
    title: str

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        if isinstance(self.dataset, ImageDataset):
            return str(self.dataset.filename(index, absolute=True))
        return f"image {index} of {self.title}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        # Its reader: timm's data set itself answers a broken image with the next one and a line in the log.
        images = self.dataset.reader if isinstance(self.dataset, ImageDataset) else self.dataset
        try:
            image, label = images[index]
        except DAMAGE as error:
            raise ImageError(f"{self.name(index)}: cannot be read ({error})") from None
        if isinstance(image, Image.Image):
            return image, int(label)
        with image as file:
            return _open_image(file, self.name(index)), int(label)


def _open_image(file: Any, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except UnidentifiedImageError:
        raise ImageError(
            f"{name}: not an image that Pillow can read; remove it or hide it with a leading dot"
        ) from None
    except (FileNotFoundError, PermissionError) as error:
        raise ImageError(f"{name}: cannot open the image ({error.strerror})") from None
    except DAMAGE as error:
        raise ImageError(f"{name}: the image is damaged or cut short ({error}); replace or remove it") from None


def _open_digits(config: DataConfig) -> tuple[Source, Source, list[str]]:
    """scikit-learn's 1,797 handwritten digits, 8x8; 1,437 to train on. The split is always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    grey_NHW, labels_N = load_digits(return_X_y=True)
    pixels_NHW = np.rint(grey_NHW.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    pixels_NHWC = np.repeat(pixels_NHW[..., None], 3, axis=3)
    train, val = train_test_split(np.arange(len(labels_N)), test_size=0.2, stratify=labels_N, random_state=0)
    labels_N = labels_N.astype(np.int64)
    return (
        _Arrays(pixels_NHWC[train], labels_N[train]),
        _Arrays(pixels_NHWC[val], labels_N[val]),
        [str(digit) for digit in range(10)],
    )


def _open_folder(config: DataConfig) -> tuple[Source, Source, list[str]]:
    """``root/train/<class>/*`` and ``root/val/<class>/*``, classes in alphabetical order."""
    root = Path(config.root or "")
    if not root.is_dir():
        raise DataError(f"data.root: there is no folder {root}")
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise DataError(f"{root}: has no folder '{split}'; images belong in train/<class>/ and val/<class>/")
    classes, val_classes = _list_classes(root / "train"), _list_classes(root / "val")
    for here, there, names in (("train", "val", classes), ("val", "train", val_classes)):
        if missing := sorted(set(names) - set(classes if there == "train" else val_classes)):
            raise DataError(f"{root}: class '{missing[0]}' is in {here}/ but not in {there}/; both need the same ones")
    if len(classes) < 2:
        raise DataError(f"{root / 'train'}: has {len(classes)} class folders; a classifier needs at least 2")
    return _list_images(root / "train", classes), _list_images(root / "val", classes), classes


def _list_classes(folder: Path) -> list[str]:
    entries = _visible(folder)
    for entry in entries:
        if not entry.is_dir():
            raise DataError(f"{entry}: lies outside any class; move it into one or hide it with a leading dot")
    return [entry.name for entry in entries]


def _list_images(folder: Path, classes: list[str]) -> _Files:
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = [str(entry) for entry in _visible(folder / name) if not entry.is_dir()]
        if not files:
            raise DataError(f"{folder / name}: class '{name}' has no images in {folder.name}/; add some or remove it")
        paths += files
        labels += [label] * len(files)
    return _Files(paths, labels)


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot list the folder ({error.strerror})") from None


def _open_timm(config: DataConfig) -> tuple[Source, Source, list[str]]:
    """A data set that ``timm.data.create_dataset`` knows and that is already on this machine."""
    name = config.dataset or ""
    if name.partition("/")[0].lower() in ("hfds", "hfids", "tfds", "wds"):
        raise DataError(f"data.dataset: {name} may come from the network; use torch/<name> or a folder on this machine")
    if config.root is None:
        raise DataError(f"data.root: {name} needs the folder that holds it; nothing is downloaded")
    try:
        train, val = (create_dataset(name, root=config.root, split=split) for split in ("train", "validation"))
    except (AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"data.dataset: timm cannot open {name} in {config.root} ({reason})") from None
    if isinstance(train, IterableImageDataset):
        raise DataError(f"data.dataset: {name} can only be read in one order; choose one with random access")
    if isinstance(train, ImageDataset):
        if train.filename(0, absolute=True) == val.filename(0, absolute=True):
            raise DataError(f"data.root: {config.root} has no split of its own to validate on; add a folder 'val'")
        indices = train.reader.class_to_idx
        classes = sorted(indices, key=indices.__getitem__)
    else:
        classes = [str(label) for label in getattr(train, "classes", [])]
    if not classes:
        raise DataError(f"data.dataset: {name} does not say what its classes are called")
    return _TimmSet(train, name), _TimmSet(val, name), classes


SOURCES = {"digits": _open_digits, "folder": _open_folder, "timm": _open_timm}


# --------------------------------------------------------------------------------------------------- images to tensors


class EvaluationImages(Dataset[Any]):
    """Validation images exactly as ``prepare`` makes them; held as float32 when there is room."""

    def __init__(self, source: Source, how: Preprocessing, hold: bool) -> None:
        self.source = source
        self.how = how
        self.held: tuple[Tensor, Tensor] | None = None
        if hold:
            images = torch.empty(len(source), 3, how.image_size, how.image_size)
            labels = torch.empty(len(source), dtype=torch.int64)
            for i in _progress(range(len(source)), "reading val"):
                image_CHW, labels[i] = self._read(i)
                images[i] = torch.from_numpy(image_CHW)
            self.held = images, labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        if self.held:
            return self.held[0][indices], self.held[1][indices]
        images, labels = zip(*map(self._read, indices), strict=True)
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)

    def _read(self, index: int) -> tuple[npt.NDArray[np.float32], int]:
        image, label = self.source.read(index)
        with _naming(self.source, index):
            return prepare(image, self.how), label


class TrainingImages(Dataset[Any]):
    """Training images, changed at random as a function of (seed, epoch, image); held as uint8 when there is room."""

    def __init__(self, source: Source, config: DataConfig, how: Preprocessing, seed: int, hold: bool) -> None:
        self.source = source
        self.config = config
        self.how = how
        self.seed = seed
        self.crop, self.recolour = _build_transforms(config)
        self.erase = RandomErasing(config.random_erase, mode="pixel", device="cpu") if config.random_erase else None
        self.mean = np.array(config.mean, np.float32).reshape(3, 1, 1)
        self.std = np.array(config.std, np.float32).reshape(3, 1, 1)
        self.draws = (-1, _draw(seed, 0, 0, 0.0))
        self.held: tuple[Any, Tensor] | None = None  # pixels as in _pixels, [N, S, S, 3] or a list; labels
        if hold:
            self.held = self._read_all()

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, Tensor]:
        epoch, indices = keys[0][0], np.array([index for _, index in keys])
        if self.draws[0] != epoch:
            self.draws = epoch, _draw(self.seed, epoch, len(self), self.config.hflip)
        draws = self.draws[1]
        pixels, labels = self._pixels(indices)
        if not (self.crop or self.recolour or self.erase):
            return self._normalise(self._shift_and_flip(np.asarray(pixels), indices, draws)), labels
        with _borrowed_randomness():
            if self.crop:
                for i, index in enumerate(indices):
                    _seed_everything(int(draws.seeds_N[index, 0]))
                    pixels[i] = np.asarray(self.crop(Image.fromarray(pixels[i])))
            batch_BCHW = self._shift_and_flip(np.asarray(pixels), indices, draws)
            if self.recolour:
                for i, index in enumerate(indices):
                    _seed_everything(int(draws.seeds_N[index, 1]))
                    image = self.recolour(Image.fromarray(np.ascontiguousarray(batch_BCHW[i].transpose(1, 2, 0))))
                    batch_BCHW[i] = np.asarray(image).transpose(2, 0, 1)
            images_BCHW = self._normalise(batch_BCHW)
            if self.erase:
                for i, index in enumerate(indices):
                    _seed_everything(int(draws.seeds_N[index, 2]))
                    self.erase(images_BCHW[i])
        return images_BCHW, labels

    def _read_all(self) -> tuple[Any, Tensor]:
        size = self.config.image_size
        count = len(self.source)
        labels = torch.empty(count, dtype=torch.int64)
        pixels: Any = [None] * count if self.crop else np.empty((count, size, size, 3), np.uint8)
        for i in _progress(range(count), "reading train"):
            pixels[i], labels[i] = self._read(i)
        return pixels, labels

    def _read(self, index: int) -> tuple[Pixels, int]:
        image, label = self.source.read(index)
        with _naming(self.source, index):
            return (_whole(image) if self.crop else _resize(image, self.how)), label

    def _pixels(self, indices: npt.NDArray[np.int64]) -> tuple[Any, Tensor]:
        """Images as [B, S, S, 3], or as a list of any sizes before a random resized crop; labels [B]."""
        if self.held is None:
            pixels, labels = zip(*(self._read(int(index)) for index in indices), strict=True)
            return list(pixels), torch.tensor(labels)
        held, labels_N = self.held
        return [held[index] for index in indices] if self.crop else held[indices], labels_N[indices]

    def _shift_and_flip(self, pixels_BSSC: Pixels, indices: npt.NDArray[np.int64], draws: Draws) -> Pixels:
        """Pad with black and cut at the drawn offset (crop: pad4), mirror what was drawn; [B, 3, S, S].

        ``pixels_BSSC`` is a copy of its own, and may be changed.
        """
        batch_BCHW = pixels_BSSC.transpose(0, 3, 1, 2)
        if self.config.crop == "pad4":
            size = self.config.image_size
            padded_BHWC = np.pad(pixels_BSSC, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(padded_BHWC, (size, size), axis=(1, 2))
            top, left = draws.offsets_N2[indices].T
            batch_BCHW = windows[np.arange(len(indices)), top, left]
        flipped = draws.flips_N[indices]
        batch_BCHW[flipped] = batch_BCHW[flipped][..., ::-1]  # a copy by now; np.where takes twice as long as all else
        return batch_BCHW

    def _normalise(self, batch_BCHW: Pixels) -> Tensor:
        # numpy, as prepare: the same numbers, and no thread pool to wait for on a busy machine.
        images_BCHW = batch_BCHW.astype(np.float32, order="C")
        images_BCHW /= np.float32(255)
        images_BCHW -= self.mean
        images_BCHW /= self.std
        return torch.from_numpy(images_BCHW)


@dataclass(frozen=True)
class Draws:
    """The random choices of one epoch, one row an image."""

    offsets_N2: npt.NDArray[np.int64]  # top, left of the crop in the padded image
    flips_N: npt.NDArray[np.bool_]
    seeds_N: npt.NDArray[np.int64]  # [N, 3]: of the random resized crop, the recolouring, the erasing


class EpochSampler(Sampler[Key]):
    """Keys (epoch, image) of ``num_drawn`` training images, without repetition, in an order drawn for the epoch."""

    def __init__(self, num_images: int, num_drawn: int, seed: int) -> None:
        self.num_images = num_images
        self.num_drawn = num_drawn
        self.seed = seed
        self.epoch = 0  # accelerate calls set_epoch on samplers that have it, with a count that forgets a resume

    def __len__(self) -> int:
        return self.num_drawn

    def __iter__(self) -> Iterator[Key]:
        order = _generator(self.seed, self.epoch, 0).permutation(self.num_images)[: self.num_drawn]
        return iter([(self.epoch, index) for index in order.tolist()])


def _draw(seed: int, epoch: int, count: int, hflip: float) -> Draws:
    rng = _generator(seed, epoch, 1)
    return Draws(
        offsets_N2=rng.integers(0, 2 * PADDING + 1, (count, 2)),
        flips_N=rng.random(count) < hflip,
        seeds_N=rng.integers(0, 2**32, (count, 3)),
    )


def _generator(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, epoch, purpose])


def _build_transforms(config: DataConfig) -> tuple[Any, Any]:
    """timm's random resized crop and its colour changes, PIL image to PIL image; None for what is not asked for."""
    if config.auto_augment and config.color_jitter and "3a" not in config.auto_augment:
        raise DataError("data.color_jitter: has no effect beside data.auto_augment in timm; set it to 0")
    try:
        crop, recolour, _ = create_transform(
            config.image_size,
            is_training=True,
            hflip=0.0,  # _shift_and_flip
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(f"data.auto_augment: timm does not understand {config.auto_augment!r} ({error!r})") from None
    return crop if config.crop == "random-resized" else None, recolour if recolour.transforms else None


@contextmanager
def _borrowed_randomness() -> Iterator[None]:
    """timm's transforms draw from global generators; give those back as they were."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm draws from it
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPU


@contextmanager
def _naming(source: Source, index: int) -> Iterator[None]:
    """What ``prepare`` has against an image, with the image's name before it."""
    try:
        yield
    except DataError as error:
        raise ImageError(f"{source.name(index)}: {error}") from None


def _whole(image: Image.Image) -> Pixels:
    if image.mode == "P":
        image = image.convert("RGBA")  # the same colours; straight to RGB warns when the palette has transparency
    return np.asarray(image.convert("RGB"))


def _resize(image: Image.Image, how: Preprocessing) -> Pixels:
    """The image as ``prepare`` resizes and crops it, before it becomes floating point; [S, S, 3]."""
    if image.mode == "RGB" and image.size == (how.image_size, how.image_size) and how.crop_pct == 1:
        return np.asarray(image)
    as_fractions = how.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    return np.rint(prepare(image, as_fractions).transpose(1, 2, 0) * 255).astype(np.uint8)


def _fits_in_memory(config: DataConfig, train: Source, val: Source) -> bool:
    pixels = config.image_size**2 * 3
    train_bytes = len(train) * pixels
    if config.crop == "random-resized":  # held at their own sizes, estimated from 64 images
        some = {len(train) * i // 64 for i in range(64)}
        sizes = [train.read(i)[0].size for i in sorted(some)]
        train_bytes = sum(width * height * 3 for width, height in sizes) * len(train) // len(some)
    return train_bytes + len(val) * pixels * 4 <= MEMORY_LIMIT_BYTES


def _progress(steps: range, title: str) -> Iterator[int]:
    console = Console(stderr=True)
    yield from track(steps, title, console=console, transient=True, disable=not console.is_terminal)


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch
