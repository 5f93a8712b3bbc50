"""Single images on the host: reading files, resizing, the crops of ImageNet training."""

import pathlib

import numpy as np

from flaxres.data.sources import DataInfo

# Evaluation crops the middle 224 of 256, at any size (Krizhevsky 2012, and all since).
_CENTRE = 224 / 256
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """`[height, width]` or `[height, width, any]` as uint8 `[height, width, channels]`."""
    image = image[..., None] if image.ndim == 2 else image
    if image.shape[-1] == channels:
        return image
    if channels == 1:  # ITU-R 601 luma
        return np.round(image[..., :3] @ np.array([0.299, 0.587, 0.114]))[..., None].astype(
            np.uint8
        )
    if image.shape[-1] == 1:
        return np.repeat(image, channels, axis=-1)
    if image.shape[-1] > channels == 3:
        return image[..., :3]
    raise ValueError(f"an image of {image.shape[-1]} channels cannot become one of {channels}")


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resample uint8 `[h, w, c]` to `[height, width, c]`: area when shrinking, else bilinear."""
    import cv2

    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] > height or image.shape[1] > width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    out = cv2.resize(image, (width, height), interpolation=method)
    return out if out.ndim == 3 else out[..., None]


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Shorter side to size · 256/224, then the middle `size` × `size`."""
    height, width = image.shape[:2]
    short = round(size / _CENTRE)
    scale = short / min(height, width)
    image = resize(image, max(short, round(height * scale)), max(short, round(width * scale)))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def random_resized_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A crop of 8 to 100 % of the area and ratio 3:4 to 4:3, resized (Szegedy 2014, 1409.4842)."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = rng.uniform(*_AREA) * height * width
        ratio = np.exp(rng.uniform(*np.log(_RATIO)))
        crop_width = round(np.sqrt(area * ratio))
        crop_height = round(np.sqrt(area / ratio))
        if crop_width <= width and crop_height <= height:
            top = rng.integers(0, height - crop_height + 1)
            left = rng.integers(0, width - crop_width + 1)
            crop = image[top : top + crop_height, left : left + crop_width]
            return resize(crop, size, size)
    return centre_crop(image, size)


def read(path: str, info: DataInfo, image_size: int | None = None) -> np.ndarray:
    """An image file as a model trained on this data set takes it: uint8 `[h, w, channels]`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not an image that can be decoded.
    """
    import PIL.Image

    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no image file {path!r}")
    height, width, channels = info.image_shape
    try:
        with PIL.Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path!r} as an image: {error}") from None
    image = to_channels(pixels, channels)
    if height is None or width is None:
        return centre_crop(image, image_size or 224)
    return resize(image, image_size or height, image_size or width)
