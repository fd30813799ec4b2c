"""Loaders: what is read, what is done to it, and what is said when it cannot be."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from mcruntime.preprocess import prepare
from PIL import Image
from torch._utils import ExceptionWrapper

from mcdeploy import data
from mcdeploy.data import build_loaders, build_mixup, set_epoch
from mcdeploy.errors import DataError
from mcdeploy.recipe import DataConfig

CLASSES = ("ant", "bee", "cat")


def picture(number: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_folder(root: Path, train: int = 6, val: int = 4, size: tuple[int, int] = (8, 8)) -> Path:
    """Noise images, no two alike: ``train`` and ``val`` of each class."""
    number = 0
    for split, count in (("train", train), ("val", val)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(number, size).save(root / split / name / f"{i}.png")
                number += 1
    return root


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images")


def config(root: Path, **changes) -> DataConfig:
    return DataConfig(**{"source": "folder", "root": str(root), "image_size": 8, **changes})


def load(root: Path, batch_size: int = 4, seed: int = 0, **changes) -> data.Loaders:
    return build_loaders(config(root, **changes), batch_size, eval_batch_size=5, seed=seed)


def epoch_of(loader, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    set_epoch(loader, epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def epoch_of_val(loaders):
    return tuple(torch.cat(parts) for parts in zip(*loaders.val, strict=True))


def same(a, b) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


EVERYTHING = {
    "image_size": 12,
    "crop": "random-resized",
    "hflip": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erase": 0.5,
}
AUGMENTATIONS = pytest.mark.parametrize(
    "changes",
    [{"crop": "pad4", "hflip": 0.5}, {"crop": "pad4", "hflip": 0.5, "color_jitter": 0.4}, EVERYTHING],
    ids=["pad4", "jitter", "everything"],
)
HOLD = pytest.mark.parametrize("in_memory", [True, False], ids=["held", "read"])


# ------------------------------------------------------------------------------------------------------- what is read


@HOLD
def test_batches_are_normalised_float_images_with_integer_labels(folder, in_memory):
    loaders = load(folder, in_memory=in_memory)
    assert loaders.classes == list(CLASSES)
    for loader, batches in ((loaders.train, 4), (loaders.val, 3)):
        assert len(list(loader)) == len(loader) == batches
        images, labels = next(iter(loader))
        assert images.shape == (loader.batch_sampler.batch_size, 3, 8, 8)
        assert images.is_contiguous()
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


@HOLD
@pytest.mark.parametrize("changes", [{}, {"image_size": 6, "crop_pct": 0.75, "interpolation": "bilinear"}])
def test_validation_images_are_exactly_what_the_server_prepares(tmp_path, in_memory, changes):
    root = make_folder(tmp_path, size=(11, 9))
    loaders = load(root, in_memory=in_memory, **changes)
    files = [root / "val" / name / f"{i}.png" for name in CLASSES for i in range(4)]
    expected = np.stack([prepare(Image.open(file), loaders.preprocessing) for file in files])
    images, labels = epoch_of_val(loaders)
    assert torch.equal(images, torch.from_numpy(expected))
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@HOLD
@pytest.mark.parametrize("changes", [{}, {"image_size": 6, "crop_pct": 0.75}])
@pytest.mark.parametrize("size", [(8, 8), (11, 9)])
def test_unaugmented_training_images_are_what_the_server_prepares(tmp_path, in_memory, changes, size):
    root = make_folder(tmp_path, size=size)
    loaders = load(root, batch_size=18, in_memory=in_memory, **changes)
    files = [root / "train" / name / f"{i}.png" for name in CLASSES for i in range(6)]
    expected = {prepare(Image.open(file), loaders.preprocessing).tobytes() for file in files}
    images, _ = epoch_of(loaders.train, 3)
    assert {image.numpy().tobytes() for image in images} == expected


def test_the_digits_are_split_alike_for_every_seed():
    first, second = (build_loaders(DataConfig(image_size=8), 128, 360, seed) for seed in (0, 1))
    assert first.classes == [str(digit) for digit in range(10)]
    assert len(first.train.dataset) == 1437
    (images, labels), (again, _) = next(iter(first.val)), next(iter(second.val))
    assert torch.equal(images, again)
    assert images.shape == (360, 3, 8, 8)
    assert labels.bincount(minlength=10).min() >= 34  # stratified
    assert not same(epoch_of(first.train, 0), epoch_of(second.train, 0))


def test_digits_keep_their_sixteen_greys_over_the_whole_range():
    how = DataConfig(image_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images, _ = next(iter(build_loaders(how, 128, 360, 0).val))
    assert (images.min(), images.max()) == (0, 1)
    assert len(images.unique()) == 17
    assert torch.equal(images[:, 0], images[:, 2])


def test_hidden_files_and_folders_are_left_out(folder):
    (folder / "train" / "ant" / ".DS_Store").write_bytes(b"no image")
    (folder / "train" / ".cache").mkdir()
    (folder / "val" / "bee" / "drafts").mkdir()
    loaders = load(folder)
    assert (len(loaders.train.dataset), len(loaders.val.dataset)) == (18, 12)
    assert loaders.classes == list(CLASSES)


@HOLD
@pytest.mark.parametrize("crop", ["none", "random-resized"])
def test_grey_palette_and_transparent_images_become_rgb(folder, in_memory, crop):
    where = folder / "train" / "ant"
    picture(1).convert("L").save(where / "grey.png")
    picture(2).convert("RGBA").save(where / "alpha.webp", lossless=True)
    picture(3).convert("CMYK").save(where / "print.jpg")
    palette = picture(4).quantize(8)
    palette.info["transparency"] = bytes(range(8))
    palette.save(where / "palette.png")
    images, _ = epoch_of(load(folder, batch_size=22, in_memory=in_memory, crop=crop).train, 0)
    assert images.shape == (22, 3, 8, 8)


def test_a_palette_has_the_colours_the_server_sees(tmp_path):
    palette = picture(4).quantize(8)
    palette.info["transparency"] = bytes(range(8))
    palette.save(tmp_path / "palette.png")
    how = load(make_folder(tmp_path / "images")).preprocessing
    image = Image.open(tmp_path / "palette.png")
    assert np.array_equal(data._whole(image), data._resize(image, how))


def test_small_data_sets_are_held_and_large_ones_read(folder, monkeypatch):
    assert load(folder).train.dataset.held is not None
    assert load(folder, crop="random-resized").train.dataset.held is not None
    for crop in ("none", "random-resized"):
        need = 18 * 8 * 8 * 3 + 12 * 8 * 8 * 3 * 4
        monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", need - 1)
        loaders = load(folder, crop=crop)
        assert loaders.train.dataset.held is None
        assert loaders.val.dataset.held is None
        monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", need)
        assert load(folder, crop=crop).val.dataset.held is not None


@AUGMENTATIONS
def test_held_and_read_images_are_the_same(folder, changes):
    held, read = (load(folder, in_memory=in_memory, **changes) for in_memory in (True, False))
    assert same(epoch_of(held.train, 1), epoch_of(read.train, 1))
    assert same(epoch_of_val(held), epoch_of_val(read))


# ------------------------------------------------------------------------------------------------ what is done to it


@AUGMENTATIONS
def test_an_epoch_depends_on_seed_and_number_and_nothing_else(folder, changes):
    loaders = load(folder, **changes)
    for epoch in (0, 1, 2):
        expected = epoch_of(loaders.train, epoch)
    random.seed(1), torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
    resumed = load(folder, **changes)
    assert same(epoch_of(resumed.train, 2), expected)
    assert not torch.equal(epoch_of(resumed.train, 3)[0], expected[0])
    assert not torch.equal(epoch_of(load(folder, seed=1, **changes).train, 2)[0], expected[0])


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_any_whole_number_is_a_seed(folder, seed):
    assert len(epoch_of(load(folder, seed=seed, crop="pad4").train, 0)[0]) == 16


def test_workers_change_nothing(folder):
    alone, helped = (load(folder, workers=workers, **EVERYTHING) for workers in (0, 2))
    for epoch in (0, 1):
        assert same(epoch_of(alone.train, epoch), epoch_of(helped.train, epoch))


def test_global_random_states_are_given_back(folder):
    loaders = load(folder, **EVERYTHING)
    random.seed(1), torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    epoch_of(loaders.train, 0), epoch_of_val(loaders)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def test_every_image_is_drawn_once_an_epoch_in_a_new_order(folder):
    loaders = load(folder, batch_size=6)
    first, second = (epoch_of(loaders.train, epoch)[0] for epoch in (0, 1))
    assert len(first.flatten(1).unique(dim=0)) == 18
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten(1).unique(dim=0), second.flatten(1).unique(dim=0))


def test_images_per_epoch_draws_other_images_each_time(folder):
    loaders = load(folder, images_per_epoch=8)
    drawn = [epoch_of(loaders.train, epoch)[0].flatten(1) for epoch in range(6)]
    assert [len(images.unique(dim=0)) for images in drawn] == [8] * 6
    assert len(torch.cat(drawn).unique(dim=0)) > 14


def test_a_batch_larger_than_the_data_is_all_of_it(folder):
    assert [len(labels) for _, labels in load(folder, batch_size=64).train] == [18]
    assert [len(labels) for _, labels in load(folder, batch_size=5).train] == [5, 5, 5]


def test_pad4_moves_an_image_by_up_to_four_pixels_over_black(tmp_path):
    root = make_folder(tmp_path)
    loaders = load(root, batch_size=18, crop="pad4", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    (held, _), moves = loaders.train.dataset.held, set()
    for epoch in range(12):
        images, _ = epoch_of(loaders.train, epoch)
        for (_, index), image in zip(loaders.train.batch_sampler.sampler, images, strict=True):
            padded = np.pad(held[index], ((4, 4), (4, 4), (0, 0))).transpose(2, 0, 1).astype(np.float32) / 255
            at = [
                (y, x) for y in range(9) for x in range(9) if (padded[:, y : y + 8, x : x + 8] == image.numpy()).all()
            ]
            assert len(at) == 1
            moves.add(at[0])
    assert {y for y, _ in moves} == {x for _, x in moves} == set(range(9))


def test_hflip_mirrors_that_share_of_the_images(folder):
    plain, half, all_ = (load(folder, batch_size=18, hflip=share) for share in (0.0, 0.5, 1.0))
    images = epoch_of(plain.train, 0)[0]
    assert torch.equal(epoch_of(all_.train, 0)[0], images.flip(3))
    mirrored = (epoch_of(half.train, 0)[0] != images).flatten(1).any(1)
    assert 3 <= mirrored.sum() <= 15
    assert torch.equal(epoch_of(half.train, 0)[0][mirrored], images.flip(3)[mirrored])


def test_random_erasing_paints_a_rectangle_of_that_share_of_the_images(folder):
    images = epoch_of(load(folder, batch_size=18).train, 0)[0]
    erased = epoch_of(load(folder, batch_size=18, random_erase=0.5).train, 0)[0]
    changed = (images != erased).any(1)
    assert 3 <= changed.flatten(1).any(1).sum() <= 15
    for mask in changed[changed.flatten(1).any(1)]:
        assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()


def test_a_random_resized_crop_sees_the_whole_image(tmp_path):
    loaders = load(make_folder(tmp_path, size=(24, 16)), batch_size=18, crop="random-resized")
    assert loaders.train.dataset.held[0][0].shape == (16, 24, 3)
    assert epoch_of(loaders.train, 0)[0].shape == (18, 3, 8, 8)


@AUGMENTATIONS
def test_two_processes_together_see_the_batches_of_one(folder, changes):
    alone = load(folder, **changes)
    shares = [
        prepare_data_loader(
            load(folder, **changes).train,
            num_processes=2,
            process_index=rank,
            split_batches=True,
            rng_types=["generator"],
        )
        for rank in (0, 1)
    ]
    for epoch in (5, 7):  # as after a resume: not accelerate's own count
        for loader in (alone.train, *shares):
            set_epoch(loader, epoch)
        for whole, left, right in zip(alone.train, *shares, strict=True):
            assert len(left[0]) == 2
            assert same(whole, [torch.cat(parts) for parts in zip(left, right, strict=True)])


def test_a_split_batch_is_cut_in_halves(folder):
    sampler = load(folder).train.batch_sampler
    shards = [BatchSamplerShard(sampler, 2, rank, split_batches=True) for rank in (0, 1)]
    assert [left + right for left, right in zip(*shards, strict=True)] == list(sampler)


def test_the_epoch_of_the_plain_loader_counts_for_the_prepared_one_too(folder):
    plain = load(folder).train
    expected = epoch_of(plain, 4)
    prepared = prepare_data_loader(plain, num_processes=1, process_index=0, split_batches=True)
    for _ in range(2):
        set_epoch(plain, 4)
        images, labels = zip(*prepared, strict=True)
        assert same((torch.cat(images), torch.cat(labels)), expected)


def test_mixup_gives_soft_labels_and_is_absent_unless_asked_for(folder):
    assert build_mixup(config(folder), 3, 0.1) is None
    for changes in ({"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}):
        np.random.seed(0)  # noqa: NPY002 - timm's Mixup draws from it
        images, labels = build_mixup(config(folder, **changes), 3, 0.1)(torch.rand(4, 3, 8, 8), torch.arange(4) % 3)
        assert images.shape == (4, 3, 8, 8)
        torch.testing.assert_close(labels.sum(1), torch.ones(4))
        assert labels.min() >= 0.1 / 3 - 1e-6


# ----------------------------------------------------------------------------------------- what is said when it cannot


def check_refused(message: str):
    return pytest.raises(DataError, match=re.escape(message))


def test_a_missing_root_is_named(tmp_path):
    with check_refused(f"there is no folder {tmp_path / 'nowhere'}"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(folder, split):
    (folder / split).rename(folder / "other")
    with check_refused(f"{folder}: has no folder '{split}'"):
        load(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_is_named(folder, split):
    for file in (folder / split / "bee").iterdir():
        file.unlink()
    with check_refused(f"{folder / split / 'bee'}: class 'bee' has no images in {split}/"):
        load(folder)


@pytest.mark.parametrize(("has", "lacks"), [("train", "val"), ("val", "train")])
def test_a_class_in_one_split_only_is_named(folder, has, lacks):
    (folder / lacks / "cat").rename(folder / "cat")
    with check_refused(f"class 'cat' is in {has}/ but not in {lacks}/"):
        load(folder)


def test_one_class_is_too_few(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
    with check_refused("a classifier needs at least 2"):
        load(tmp_path)


def test_an_image_outside_any_class_is_named(folder):
    picture(1).save(folder / "train" / "stray.png")
    with check_refused(f"{folder / 'train' / 'stray.png'}: lies outside any class"):
        load(folder)


def read_everything(loaders):
    epoch_of(loaders.train, 0), epoch_of_val(loaders)


@HOLD
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_image_is_named(folder, split, in_memory):
    file = folder / split / "bee" / "1.png"
    file.write_bytes(file.read_bytes()[:-60])
    with check_refused(f"{file}: the image is damaged or cut short"):
        read_everything(load(folder, batch_size=18, in_memory=in_memory))


@HOLD
def test_a_damaged_image_is_named(folder, in_memory):
    file = folder / "train" / "bee" / "1.png"
    content = bytearray(file.read_bytes())
    content[60:80] = bytes(20)
    file.write_bytes(content)
    with check_refused(f"{file}: the image is damaged or cut short"):
        read_everything(load(folder, batch_size=18, in_memory=in_memory))


def test_of_several_broken_images_the_first_is_named(folder):
    for name in ("2.png", "4.png"):
        (folder / "train" / "bee" / name).write_bytes(b"")
    with check_refused(f"{folder / 'train' / 'bee' / '2.png'}: not an image"):
        load(folder)


@HOLD
def test_a_file_that_is_no_image_is_named(folder, in_memory):
    file = folder / "val" / "cat" / "notes.txt"
    file.write_text("not an image")
    with check_refused(f"{file}: not an image that Pillow can read"):
        read_everything(load(folder, in_memory=in_memory))


def test_an_image_too_long_to_resize_is_named(folder):
    file = folder / "val" / "cat" / "thin.png"
    Image.new("RGB", (60_000, 1)).save(file)
    with check_refused(f"{file}: the image is too long and thin"):
        load(folder, image_size=64)


def test_a_dangling_link_is_named(folder):
    file = folder / "val" / "cat" / "gone.png"
    file.symlink_to(folder / "nowhere.png")
    with check_refused(f"{file}: cannot open the image (No such file or directory)"):
        load(folder)


def test_an_image_without_permission_is_named(folder, monkeypatch):
    def refuse(file, *args, **kwargs):  # root may read everything, so the refusal is played
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr(Image, "open", refuse)
    with check_refused(f"{folder / 'train' / 'ant' / '0.png'}: cannot open the image (Permission denied)"):
        load(folder)


def test_a_folder_without_permission_is_named(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with check_refused(f"{folder / 'train'}: cannot list the folder (Permission denied)"):
        load(folder)


def test_a_worker_says_it_in_the_same_sentence(folder):
    file = folder / "train" / "bee" / "1.png"
    file.write_bytes(b"")
    images = load(folder, in_memory=False).train.dataset
    try:
        images.__getitems__([(0, 7)])
    except DataError as error:
        sentence = str(error)
        travelled = ExceptionWrapper(where="in DataLoader worker process 0")
    with check_refused(str(file)) as caught:
        travelled.reraise()
    assert str(caught.value) == sentence


def test_more_images_per_epoch_than_there_are_is_refused(folder):
    with check_refused("data.images_per_epoch: 19 is more than the 18 training images"):
        load(folder, images_per_epoch=19)


def test_mixup_of_an_odd_batch_is_refused(folder):
    with check_refused("a batch of 5 is odd"):
        load(folder, batch_size=5, mixup=0.2)


def test_a_policy_that_timm_does_not_know_is_refused(folder):
    with check_refused("data.auto_augment: timm does not understand 'nonsense'"):
        load(folder, auto_augment="nonsense")


def test_color_jitter_that_timm_would_drop_is_refused(folder):
    with check_refused("data.color_jitter: has no effect beside data.auto_augment"):
        load(folder, auto_augment="rand-m9", color_jitter=0.4)


# ---------------------------------------------------------------------------------------------------- timm's data sets


def timms(root: Path | None, dataset: str, **changes) -> data.Loaders:
    how = DataConfig(source="timm", root=root and str(root), dataset=dataset, image_size=8, **changes)
    return build_loaders(how, 4, 5, 0)


@HOLD
@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_timms_folder_data_sets_give_the_images_of_ours(folder, dataset, in_memory):
    expected, loaders = load(folder), timms(folder, dataset, in_memory=in_memory)
    assert loaders.classes == expected.classes
    assert same(epoch_of_val(loaders), epoch_of_val(expected))
    assert same(epoch_of(loaders.train, 0), epoch_of(expected.train, 0))


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_a_broken_image_in_a_timm_data_set_is_an_error_not_its_neighbour(folder, dataset):
    file = folder / "train" / "bee" / "1.png"
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"cut short|cannot be read"):
        timms(folder, dataset)


def test_a_timm_data_set_that_is_not_there_is_one_sentence(tmp_path):
    with check_refused(f"data.dataset: timm cannot open torch/cifar10 in {tmp_path} (Dataset not found or corrupted"):
        timms(tmp_path, "torch/cifar10")
    with check_refused("timm cannot open torch/nonsense"):
        timms(tmp_path, "torch/nonsense")
    with check_refused("timm cannot open folder in"):
        timms(tmp_path / "nowhere", "folder")


def test_a_timm_data_set_needs_a_root():
    with check_refused("data.root: torch/cifar10 needs the folder that holds it"):
        timms(None, "torch/cifar10")


@pytest.mark.parametrize("dataset", ["hfds/cifar10", "tfds/cifar10", "wds/x", "hfids/y"])
def test_timm_data_sets_of_the_network_are_refused(tmp_path, dataset):
    with check_refused(f"data.dataset: {dataset} may come from the network"):
        timms(tmp_path, dataset)


def test_a_timm_folder_without_a_validation_split_is_refused(folder):
    with check_refused("has no split of its own to validate on"):
        timms(folder / "train", "")
