"""The Jacobian that aggregators get."""

import numpy as np


def sampled(tasks: int, parameters: int) -> np.ndarray:
    """Independent gradients around a common one, `(tasks, parameters)` float32."""
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((tasks, parameters), np.float32)
    grads += 0.5 * rng.standard_normal(parameters, np.float32)
    return grads
