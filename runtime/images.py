"""Pictures from image files, upright and in 8 bits. video.py does the same for videos."""

import os
import warnings
from contextlib import suppress

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor


def open_image(path: str) -> Image.Image:
    """A picture whose pixels are not decoded yet. Raises what Pillow raises, or ValueError."""
    if os.path.exists(path) and not os.path.isfile(path):  # opening a FIFO would wait forever
        raise ValueError('not a regular file')
    warnings.filterwarnings('ignore', module='PIL')  # odd metadata, and pictures of 90 to 180 megapixels
    image = Image.open(path)
    image.filename = ''  # with a name, Pillow 11 to 13 would map a bare TIFF with its sides swapped
    if image.format == 'EPS':  # Pillow would hand it to another program to draw
        raise ValueError('EPS is a drawing, not a picture')
    return image


def upright(image: Image.Image) -> Image.Image:
    """An opened picture, decoded, rotated as its metadata says, in 8 bits. A second call changes nothing.
    Raises ValueError for 32-bit grey, whose white is unknown; a damaged file can raise any Exception."""
    image.load()
    with suppress(Exception):  # broken metadata can raise anything; the picture may be sound
        ImageOps.exif_transpose(image, in_place=True)  # to spare a copy
    if image.mode == 'F' or (image.mode == 'I' and image.format not in ('PNG', 'PPM')):
        raise ValueError('32-bit grey, whose white is unknown; save it as 16-bit')
    if image.mode.startswith('I'):  # over 8 bits of grey, which convert() would clip at 255
        bits = image.tag_v2[ExifTags.Base.BitsPerSample][0] if image.format == 'TIFF' else 16
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    return image


def size_upright(image: Image.Image) -> tuple[int, int]:
    """The height and width that an opened picture has upright. A JPEG is not decoded for that."""
    if image.format not in ('JPEG', 'MPO'):  # metadata may come last, or change the size
        image = upright(image)
    width, height = image.size
    with suppress(Exception):  # as above
        if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # lies on its side
            return width, height
    return height, width


def to_tensor(image: Image.Image) -> Tensor:
    """An 8-bit picture of any kind -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1)
