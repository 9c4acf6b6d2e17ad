"""Image classification: any image data set of the Hub, a folder of images, or scikit-learn's small digits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from transformers import BaseImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ...errors import UserError, did_you_mean
from ...hub import limit_silence
from ..base import check_split
from .base import ThoughtExamples, ThoughtTask, ThoughtTaskArguments, check_at_least

# Splits of up to so many bytes of prepared images are kept in memory.
MOST_KEPT = 2**28
DIGITS_TEST_SHARE = 0.2


def plain_processor(size: int | None = None) -> BaseImageProcessor:
    """Brings the values of RGB images to [-1, 1], and the images to a square of `size` pixels if one is given."""
    return ViTImageProcessorPil(
        do_resize=size is not None,
        size=None if size is None else {"height": size, "width": size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )


@strict
@dataclass(kw_only=True)
class DigitOptions:
    """Options of the digits task."""

    image_size: int | None = field(
        default=None, metadata={"help": "Height and width that images are resized to; by default they are left alone."}
    )

    def validate_ranges(self) -> None:
        check_at_least(self, image_size=1)


@strict
@dataclass(kw_only=True)
class ImageOptions(DigitOptions):
    """Options of the images task."""

    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images; by default the only one with images."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the classes; by default the only one with named classes."}
    )
    test_split: str = field(
        default="test", metadata={"help": "Split that the finished model is measured on; the data set's own name."}
    )


class ImageTask(ThoughtTask):
    """What image classification tasks share: RGB images with values brought to [-1, 1], and one class each."""

    head = "image"

    def __init__(self, arguments: ThoughtTaskArguments):
        super().__init__(arguments)
        self._sets: dict[str, tuple[datasets.Dataset, np.ndarray]] | None = None
        self._examples: dict[str, ImageExamples] = {}
        self._shape: tuple[int, int] | None = None

    def image_processor(self) -> BaseImageProcessor:
        return plain_processor(self.options.image_size)

    def load(self) -> tuple[dict[str, datasets.Dataset], str, str]:
        """The data's own splits "train", "test" and perhaps "validation", and the columns of image and class."""
        raise NotImplementedError

    def sets(self) -> dict[str, tuple[datasets.Dataset, np.ndarray]]:
        """For each split its rows, with the columns `image` and `label`, and their numbers in the data's own split,
        counted from 1."""
        if self._sets is not None:
            return self._sets
        loaded, image_column, label_column = self.load()
        found = {}
        for split, rows in loaded.items():
            rows = rows.select_columns([image_column, label_column])
            rows = rows.rename_columns({k: v for k, v in ((image_column, "image"), (label_column, "label")) if k != v})
            found[split] = (rows, np.arange(len(rows)))
        rng = np.random.default_rng(self.arguments.split_seed)
        if "validation" not in found:
            rows, numbers = found["train"]
            held = max(1, round(float(self.arguments.validation_fraction) * len(rows)))
            if held >= len(rows):
                raise UserError(f"{self.source}: {len(rows)} training images leave none beside those for validation")
            order = rng.permutation(numbers)
            found["validation"] = (rows, np.sort(order[:held]))
            found["train"] = (rows, np.sort(order[held:]))
        for split, (rows, numbers) in found.items():
            most = self.arguments.max_samples(split)
            if most is not None and most < len(numbers):
                found[split] = (rows, np.sort(rng.permutation(numbers)[:most]))
        self._sets = {split: (rows.select(numbers), numbers + 1) for split, (rows, numbers) in found.items()}
        return self._sets

    @property
    def classes(self) -> list[str]:
        return self.sets()["train"][0].features["label"].names

    def config_values(self) -> dict[str, Any]:
        return {**super().config_values(), "num_channels": 3}

    def examples(self, split: str) -> "ImageExamples":
        check_split(split)
        if split not in self._examples:
            self._examples[split] = ImageExamples(self, split)
        return self._examples[split]

    def prepared(self, image: Image.Image, place: Callable[[], str]) -> torch.Tensor:
        """An image as the model reads it, of shape `(3, height, width)`; all must be of one size.

        Raises:
            UserError: naming the place of an image of another size, which is asked for only then.
        """
        pixels = self.image_processor()(image, return_tensors="pt")["pixel_values"][0]
        shape = (int(pixels.shape[1]), int(pixels.shape[2]))
        if self._shape is None:
            self._shape = shape
        if shape != self._shape:
            raise UserError(
                f"{place()}: has {shape[0]}x{shape[1]} pixels, others {self._shape[0]}x{self._shape[1]}; give "
                "task.options image_size to resize them all"
            )
        return pixels


class ImageExamples(ThoughtExamples):
    """Images of one split; kept in memory once prepared if they are not too many."""

    def __init__(self, task: ImageTask, split: str):
        self.task, self.split = task, split
        self.rows, self.numbers = task.sets()[split]
        self._labels = np.array(self.rows["label"], dtype=object)
        num_classes = len(task.classes)
        for index, label in enumerate(self._labels):
            if not isinstance(label, int) or not 0 <= label < num_classes:
                raise UserError(
                    f"{task.source}, {split}, row {self.numbers[index]}, label: {label!r} is none of the "
                    f"{num_classes} classes"
                )
        self._kept: list[torch.Tensor] = []
        if self.pixels(0).nbytes * len(self) <= MOST_KEPT:
            self._kept = [self.pixels(index) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        """The image of an example as it is stored."""
        index = range(len(self))[index]
        try:
            return self.rows[index]["image"].convert("RGB")
        except Exception as error:  # each decoder raises its own
            raise UserError(f"{self.place(index)}: cannot be read as an image") from error

    def place(self, index: int) -> str:
        """Where an image is stored: its file, or the row of a data set that has none."""
        stored = self.rows.cast_column("image", datasets.Image(decode=False))[index]["image"]
        if stored is not None and stored["path"] is not None and stored["bytes"] is None:
            return stored["path"]
        return f"{self.task.source}, {self.split}, row {self.numbers[index]}, image"

    def pixels(self, index: int) -> torch.Tensor:
        """The image of an example as the model reads it, of shape `(3, height, width)`."""
        index = range(len(self))[index]
        if self._kept:
            return self._kept[index]
        return self.task.prepared(self.image(index), lambda: self.place(index))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels(index), "labels": torch.tensor(self._labels[range(len(self))[index]])}

    def labels(self, index: int) -> np.ndarray:
        return np.array(self._labels[index], dtype=np.int64)

    def identity(self, index: int) -> str:
        return f"{self.split}-{self.numbers[index]}"

    def picture(self, index: int) -> np.ndarray:
        return np.asarray(self.image(index))


class Images(ImageTask):
    """
    Any image data set with named classes: `hub_id` of the Hub, or `data_dir`, a folder `<split>/<class>/<file>` as
    `datasets` reads it. Images are made RGB, resized to `options.image_size` if that is given, and brought to [-1, 1];
    nothing is augmented. Without a validation split of its own, `validation_fraction` of train is held out.
    """

    name = "images"
    options_class = ImageOptions

    def __init__(self, arguments: ThoughtTaskArguments):
        super().__init__(arguments)
        if (arguments.data_dir is None) == (arguments.hub_id is None):
            raise UserError("task: the task images reads hub_id or data_dir; give one of the two")

    @property
    def license(self) -> str:  # type: ignore[override]
        return "as the source of the images states it"

    @property
    def source(self) -> str:
        if self.arguments.data_dir is not None:
            return "local images in a folder for each class"
        config = f" ({self.arguments.hub_config})" if self.arguments.hub_config else ""
        revision = f" at {self.arguments.hub_revision}" if self.arguments.hub_revision else ""
        return f"{self.arguments.hub_id}{config}{revision}"

    def load(self) -> tuple[dict[str, datasets.Dataset], str, str]:
        arguments = self.arguments
        try:
            if arguments.data_dir is not None:
                folder = Path(arguments.data_dir).expanduser()
                if not folder.is_dir():
                    raise UserError(f"task.data_dir: {folder} is no folder")
                loaded = datasets.load_dataset("imagefolder", data_dir=str(folder))
            else:
                limit_silence()
                loaded = datasets.load_dataset(arguments.hub_id, arguments.hub_config, revision=arguments.hub_revision)
        except UserError:
            raise
        except Exception as error:  # each builder raises its own
            where = "data_dir" if arguments.data_dir is not None else "hub_id"
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"task.{where}: cannot load the images of {getattr(arguments, where)}: {reason}") from error
        test = self.options.test_split
        for split in ("train", test):
            if split not in loaded:
                raise UserError(
                    f"{self.source} has no split {split!r}{did_you_mean(split, loaded)}; it has "
                    f"{', '.join(map(str, loaded))}"
                )
        if arguments.data_dir is not None:
            self._check_folders(folder, loaded["train"].features)
        found = {"train": loaded["train"], "test": loaded[test]}
        if "validation" in loaded and test != "validation":
            found["validation"] = loaded["validation"]
        features = loaded["train"].features
        image = self._column("image_column", datasets.Image, features)
        return found, image, self._column("label_column", datasets.ClassLabel, features)

    @staticmethod
    def _check_folders(folder: Path, features: datasets.Features) -> None:
        """Images directly in the folder of a split would be taken for a class of the split's name."""
        splits = {path.name for path in folder.iterdir() if path.is_dir()}
        for feature in features.values():
            if isinstance(feature, datasets.ClassLabel) and splits.issuperset(feature.names):
                raise UserError(
                    f"task.data_dir: {folder} holds images directly in {', '.join(feature.names)}; they must lie in a "
                    "folder for each class, <split>/<class>/<file>"
                )

    def _column(self, option: str, kind: type, features: datasets.Features) -> str:
        """The column of a kind that an option names, or the only one there is."""
        fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
        named = getattr(self.options, option)
        if named is not None and named not in fitting:
            raise UserError(
                f"task.options: {option} is {named!r}{did_you_mean(named, fitting)}; columns of {self.source} with a "
                f"{kind.__name__}: {', '.join(fitting) or 'none'}"
            )
        if named is None and len(fitting) != 1:
            raise UserError(
                f"task.options: give {option}; columns of {self.source} with a {kind.__name__}: "
                f"{', '.join(fitting) or 'none'}"
            )
        return named or fitting[0]


class Digits(ImageTask):
    """
    The 1,797 handwritten digits of 8 by 8 pixels that come with scikit-learn (extra `digits`), a test set of the UCI
    repository's "Optical Recognition of Handwritten Digits". A fifth of them, drawn by `split_seed`, is the test. Their
    17 grey levels become RGB images.
    """

    name = "digits"
    license = "CC BY 4.0"
    options_class = DigitOptions
    source = "scikit-learn's copy of the UCI optical recognition of handwritten digits, 8 by 8 pixels"

    def __init__(self, arguments: ThoughtTaskArguments):
        super().__init__(arguments)
        for name in ("data_dir", "hub_id", "hub_config", "hub_revision"):
            if getattr(arguments, name) is not None:
                raise UserError(f"task.{name}: the task digits comes with scikit-learn; leave it out, or use images")

    def load(self) -> tuple[dict[str, datasets.Dataset], str, str]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError(
                "task.name: digits come with scikit-learn, which is not installed: "
                "pip install 'adaptive-reasoners[digits]'"
            ) from error
        digits = load_digits()
        grey = (digits.images * (255 / 16)).round().astype(np.uint8)
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(number) for number in range(10)])}
        )
        rows = datasets.Dataset.from_dict(
            {"image": [Image.fromarray(image) for image in grey], "label": digits.target.tolist()}, features=features
        )
        order = np.random.default_rng(self.arguments.split_seed).permutation(len(rows))
        number = round(DIGITS_TEST_SHARE * len(rows))
        return {"train": rows.select(order[number:]), "test": rows.select(order[:number])}, "image", "label"
