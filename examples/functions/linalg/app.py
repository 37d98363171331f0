"""Dense linear algebra with numpy: solve, multiply, decompose.

`size` is the order of the matrices. A ridge system of a generated design
matrix is solved, corrected by a calibration built at import, and described
by its spectrum.
"""

import hashlib

import numpy as np

DEFAULT_SIZE = 256
MAX_SIZE = 2_048


def _calibration():
    rng = np.random.default_rng(2022)
    factor = rng.standard_normal((512, 512))
    return factor @ factor.T / 512 + np.eye(512)


CALIBRATION = _calibration()
CALIBRATION_FACTOR = np.linalg.cholesky(CALIBRATION)


def _digest(values):
    """Hash of values to 8 decimals; adding 0.0 turns -0.0 into 0.0."""
    return hashlib.sha256((np.round(values, 8) + 0.0).tobytes()).hexdigest()


def handler(event, context):
    seed = int(event.get("seed", 0))
    size = int(event.get("size", DEFAULT_SIZE))
    if seed < 0:
        raise ValueError(f"seed must not be negative, but is {seed}")
    if not 2 <= size <= MAX_SIZE:
        raise ValueError(f"size must be 2 to {MAX_SIZE}, not {size}")

    rng = np.random.default_rng(seed)
    design = rng.standard_normal((2 * size, size))
    target = rng.standard_normal(2 * size)

    gram = design.T @ design + size * np.eye(size)
    solution = np.linalg.solve(gram, design.T @ target)
    residual = float(np.linalg.norm(design @ solution - target))
    spectrum = np.linalg.eigvalsh(gram)
    singular = np.linalg.svd(design, compute_uv=False)

    corner = min(size, CALIBRATION.shape[0])
    calibrated = CALIBRATION_FACTOR[:corner, :corner] @ solution[:corner]
    return {
        "order": size,
        "residual": round(residual, 6),
        "condition": round(float(spectrum[-1] / spectrum[0]), 6),
        "log_determinant": round(float(np.log(spectrum).sum()), 6),
        "nuclear_norm": round(float(singular.sum()), 6),
        "calibrated_norm": round(float(np.linalg.norm(calibrated)), 6),
        "solution_sha256": _digest(solution),
    }
