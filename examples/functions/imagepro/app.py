"""Image processing with Pillow: draw, transform, filter, stamp, encode.

A picture of `size` by `size` pixels is generated (a noisy gradient with
shapes on it), taken through the steps of a thumbnail service, and encoded
as PNG, JPEG and WebP in memory.
"""

import hashlib
import io

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

DEFAULT_SIZE = 256
MAX_SIZE = 4_096
THUMBNAIL = 96


def _watermark():
    mark = Image.new("L", (160, 40), 0)
    draw = ImageDraw.Draw(mark)
    draw.rounded_rectangle((1, 1, 158, 38), radius=8, outline=160, width=2)
    draw.text((14, 8), "proof copy", fill=200, font=ImageFont.load_default(size=20))
    return mark


WATERMARK = _watermark()
# Looking codecs up imports their modules: done once, not in the first request.
Image.init()


def generate(rng, size):
    """A gradient with sensor noise and 24 overlapping shapes."""
    ramp = np.linspace(0, 255, size)
    corner = rng.uniform(0.2, 1.0, size=3)
    pixels = np.empty((size, size, 3))
    pixels[..., 0] = ramp[None, :] * corner[0]
    pixels[..., 1] = ramp[:, None] * corner[1]
    pixels[..., 2] = ramp[::-1, None] * corner[2]
    pixels += rng.normal(0, 6, size=pixels.shape)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(24):
        x, y = (int(v) for v in rng.integers(0, size, size=2))
        width, height = (int(v) for v in rng.integers(1, size // 3 + 2, size=2))
        colour = tuple(int(v) for v in rng.integers(0, 256, size=3))
        shape = draw.ellipse if rng.integers(2) else draw.rectangle
        shape((x, y, x + width, y + height), fill=colour)
    return image


def _encode(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    data = buffer.getvalue()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def handler(event, context):
    seed = int(event.get("seed", 0))
    size = int(event.get("size", DEFAULT_SIZE))
    if seed < 0:
        raise ValueError(f"seed must not be negative, but is {seed}")
    if not 16 <= size <= MAX_SIZE:
        raise ValueError(f"size must be 16 to {MAX_SIZE}, not {size}")

    rng = np.random.default_rng(seed)
    image = generate(rng, size)
    rotated = image.rotate(float(rng.uniform(-30, 30)), Image.Resampling.BICUBIC)
    mirrored = ImageOps.mirror(rotated)
    sharpened = mirrored.filter(ImageFilter.UnsharpMask(radius=2, percent=120))
    toned = ImageEnhance.Color(ImageOps.autocontrast(sharpened)).enhance(1.3)
    toned.paste((255, 255, 255), (0, 0), WATERMARK)
    thumbnail = ImageOps.fit(toned, (THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    edges = ImageOps.grayscale(thumbnail).filter(ImageFilter.FIND_EDGES)

    return {
        "pixels": size * size,
        "edge_mean": round(float(np.asarray(edges).mean()), 6),
        "histogram_sha256": hashlib.sha256(
            np.asarray(toned.histogram(), dtype="<u4").tobytes()
        ).hexdigest(),
        "full_jpeg": _encode(toned, "JPEG", quality=85),
        "thumbnail_png": _encode(thumbnail, "PNG"),
        "thumbnail_webp": _encode(thumbnail, "WEBP", quality=80),
    }
