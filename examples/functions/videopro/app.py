"""Video processing with OpenCV: greyscale, blur, edges, motion, Motion JPEG.

`size` is the number of frames of a generated 320x240 clip. The processed
clip is written as an AVI file to a private directory in /tmp, the only place
where a function may write, read back frame by frame, and removed.
"""

import hashlib
import os
import tempfile

import cv2
import numpy as np

# OpenCV sizes its own thread pool by the machine's cores, whatever OpenMP's
# variables say; one thread keeps a request to one core.
cv2.setNumThreads(1)
cv2.ocl.setUseOpenCL(False)

DEFAULT_SIZE = 12
MAX_SIZE = 5_000
WIDTH, HEIGHT = 320, 240
FPS = 24


def _background():
    """Smooth noise, larger than a frame, over which the camera pans."""
    rng = np.random.default_rng(2022)
    noise = rng.integers(0, 256, size=(32, 48, 3), dtype=np.uint8)
    return cv2.resize(noise, (3 * WIDTH, 2 * HEIGHT), interpolation=cv2.INTER_CUBIC)


BACKGROUND = _background()
KERNEL = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))


def frames(rng, count):
    """A panning camera over the background, with six balls that bounce."""
    position = rng.uniform(30, [WIDTH - 30, HEIGHT - 30], size=(6, 2))
    velocity = rng.uniform(-9, 9, size=(6, 2))
    colour = rng.integers(0, 256, size=(6, 3))
    radius = rng.integers(8, 28, size=6)
    offset = int(rng.integers(0, WIDTH))
    for t in range(count):
        x = offset + int(WIDTH / 2 * (1 + np.sin(t / 40)))
        frame = BACKGROUND[t % HEIGHT : t % HEIGHT + HEIGHT, x : x + WIDTH].copy()
        for i in range(6):
            centre = (int(position[i, 0]), int(position[i, 1]))
            shade = tuple(int(c) for c in colour[i])
            cv2.circle(frame, centre, int(radius[i]), shade, -1)
        position += velocity
        velocity = np.where((position < 0) | (position > [WIDTH, HEIGHT]), -velocity, velocity)
        yield frame


def handler(event, context):
    seed = int(event.get("seed", 0))
    size = int(event.get("size", DEFAULT_SIZE))
    if seed < 0:
        raise ValueError(f"seed must not be negative, but is {seed}")
    if not 2 <= size <= MAX_SIZE:
        raise ValueError(f"size must be 2 to {MAX_SIZE}, not {size}")

    rng = np.random.default_rng(seed)
    edge_pixels = moving_pixels = 0
    previous = None
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="videopro-") as scratch:
        path = os.path.join(scratch, "clip.avi")
        writer = cv2.VideoWriter(
            path,
            cv2.CAP_OPENCV_MJPEG,
            cv2.VideoWriter_fourcc(*"MJPG"),
            FPS,
            (WIDTH, HEIGHT),
        )
        if not writer.isOpened():
            raise RuntimeError(f"OpenCV cannot write Motion JPEG to {path}")
        for frame in frames(rng, size):
            grey = cv2.GaussianBlur(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), (5, 5), 1.2)
            edges = cv2.Canny(grey, 60, 140)
            edge_pixels += cv2.countNonZero(edges)
            if previous is not None:
                motion = cv2.threshold(cv2.absdiff(grey, previous), 24, 255, cv2.THRESH_BINARY)[1]
                moving_pixels += cv2.countNonZero(cv2.morphologyEx(motion, cv2.MORPH_OPEN, KERNEL))
            previous = grey
            writer.write(cv2.merge([grey, grey, cv2.max(grey, edges)]))
        writer.release()

        with open(path, "rb") as clip:
            data = clip.read()
        reader = cv2.VideoCapture(path, cv2.CAP_OPENCV_MJPEG)
        decoded = hashlib.sha256()
        read_back = 0
        while True:
            more, frame = reader.read()
            if not more:
                break
            decoded.update(frame)
            read_back += 1
        reader.release()

    if read_back != size:
        raise RuntimeError(f"wrote {size} frames, read {read_back} back")
    return {
        "frames": size,
        "edge_pixels": edge_pixels,
        "moving_pixels": moving_pixels,
        "clip_bytes": len(data),
        "clip_sha256": hashlib.sha256(data).hexdigest(),
        "decoded_sha256": decoded.hexdigest(),
    }
