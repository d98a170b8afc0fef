"""Images: a folder of them, and what a model's image processor makes of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxc.data.inputs import Inputs
from fxc.errors import UsageError, first_line
from fxc.safety import listed, read_json

SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def images_in(folder: Path) -> list[Path]:
    found = [p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    if not found:
        raise UsageError(
            "there are no images in this folder",
            where=folder,
            hint=f"it may hold {', '.join(sorted(SUFFIXES))}; of texts, name one file",
        )
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


@dataclass(frozen=True)
class Images:
    """Makes inputs of image files. folder: where the image processor is, if that is known."""

    inputs: Inputs
    folder: Path | None

    def samples(self, paths: list[Path]) -> Iterator[list[Tensor]]:
        self._check_takes(paths[0].parent)
        image = _pillow()
        for path in paths:
            try:
                with image.open(path) as opened:
                    picture = self._converted(opened)
            except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
                why = first_line(error)
                raise UsageError("this is not an image that can be read", where=path, why=why, hint="take it out") from None
            yield self._sample(picture, path)

    def sample(self, picture: Any, where: object) -> list[Tensor]:
        """Of one picture that Pillow has opened."""
        self._check_takes(where)
        return self._sample(self._converted(picture), where)

    def _check_takes(self, where: object) -> None:
        if "pixel_values" not in self.inputs.names:
            text = "input_ids" in self.inputs.names
            raise UsageError(
                f"this model does not take images: it takes {listed(self.inputs.names)}",
                where=where,
                hint="name a text file" if text else "in Python, give an iterable of its inputs: calib=[tensor, ...]",
            )
        self.inputs.check_covers(["pixel_values", "pixel_mask"], "a folder of images", where)

    def _converted(self, picture: Any) -> Any:
        return picture.convert("L" if self.target[0] == 1 else "RGB")

    def _sample(self, picture: Any, where: object) -> list[Tensor]:
        made = {k: v for k, v in self._pixels(picture, where).items() if k in self.inputs.names and isinstance(v, Tensor)}
        return self.inputs.sample((), made, where)

    def _pixels(self, picture: Any, where: object) -> Mapping[str, Any]:
        try:
            if self.processor is None:
                return {"pixel_values": plain_pixels(self.settings, picture, *self.target[1:])}
            return self.processor(images=picture, return_tensors="pt")
        except (ImportError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError, RuntimeError) as error:
            raise UsageError(
                "the model's image processor cannot use this image",
                where=where,
                why=first_line(error),
                hint=f"see {self.folder}; or prepare the images in Python: calib=[tensor, ...]",
            ) from None

    @cached_property
    def target(self) -> tuple[int, int, int]:
        """Channels, height and width that the program was captured for."""
        shape = self.inputs.program.placeholders[self.inputs.names.index("pixel_values")].meta["val"].shape
        if len(shape) != 4:
            raise UsageError(
                f"pixel_values has {len(shape)} dimensions, so that an image alone is no input",
                hint="prepare the images in Python: calib=[{'pixel_values': tensor}, ...]",
            )
        return tuple(size if isinstance(size, int) else int(size.node.hint) for size in shape[1:])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the folder says of preparing images."""
        path = next((self.folder / n for n in _PROCESSORS if self.folder and (self.folder / n).is_file()), None)
        if path is None:
            raise UsageError(
                "the model came without an image processor",
                where=self.folder,
                hint="put its preprocessor_config.json into the folder, or prepare the images in Python: calib=[tensor, ...]",
            )
        settings = read_json(path)
        return settings.get("image_processor", settings)

    @cached_property
    def processor(self) -> Any:
        """transformers' own image processor, or None where it has none for this folder or needs torchvision for it."""
        from transformers import AutoImageProcessor

        if not self.settings:
            return None
        try:
            return AutoImageProcessor.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False)
        except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def plain_pixels(settings: Mapping[str, Any], picture: Any, height: int, width: int) -> Tensor:
    """[1, channels, H, W] from a picture: resized, cropped and normalized as `settings`, a preprocessor_config.json, says;
    to `height` and `width`, 1/255, mean and deviation 0.5 where it says nothing."""
    if settings.get("do_resize", True):
        size = settings.get("size") or {"height": height, "width": width}
        picture = picture.resize(_resized(size, *picture.size), settings.get("resample", 2))
    if settings.get("do_center_crop", "crop_size" in settings):
        size = settings.get("crop_size") or {"height": height, "width": width}
        wide, high = _resized(size if isinstance(size, Mapping) else {"height": size, "width": size}, *picture.size)
        left, top = (picture.width - wide) // 2, (picture.height - high) // 2
        picture = picture.crop((left, top, left + wide, top + high))
    pixels = torch.from_numpy(np.array(picture)).float()
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if settings.get("do_rescale", True):
        pixels = pixels * settings.get("rescale_factor", 1 / 255)
    if settings.get("do_normalize", True):
        mean, deviation = (
            torch.tensor(settings.get(key, 0.5), dtype=torch.float32).reshape(-1, 1, 1) for key in ("image_mean", "image_std")
        )
        pixels = (pixels - mean) / deviation
    return pixels[None]


def _resized(size: Any, width: int, height: int) -> tuple[int, int]:
    """(width, height) that `size` asks for: {"height", "width"}, a number (both), or {"shortest_edge"}, in proportion."""
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(width, height)
        if "longest_edge" in size:
            scale = min(scale, size["longest_edge"] / max(width, height))
        return max(1, int(width * scale)), max(1, int(height * scale))
    return size["width"], size["height"]


def is_picture(value: Any) -> bool:
    """Whether it is an image of Pillow, which need not be there to tell."""
    return all(hasattr(value, name) for name in ("convert", "mode", "getbands"))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UsageError("reading images needs Pillow", hint="pip install pillow") from None
    return Image
