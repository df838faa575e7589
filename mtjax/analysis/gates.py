"""Which experts a model uses, for which task, and which have died."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mtjax.analysis.sown import mean_of_sown


class ExpertUtilisation(NamedTuple):
    """What gates and experts do on a data set, by the path of their module.

    Attributes:
      weights: per module of gates, `(gates, experts)` mean weight of every expert in
        every gate: gates in the order of the tasks, experts in the order of the model.
      zero_rate: per module of experts, `(experts,)` share of outputs that are 0.
      mean: per module of experts, `(experts,)` mean output.
      variance: per module of experts, `(experts,)` variance of the outputs, over
        examples and features.
    """

    weights: dict[str, Float[np.ndarray, "gates experts"]]
    zero_rate: dict[str, Float[np.ndarray, " experts"]]
    mean: dict[str, Float[np.ndarray, " experts"]]
    variance: dict[str, Float[np.ndarray, " experts"]]


def expert_utilisation(
    model: Any, variables: Mapping[str, Any], batches: Iterable[Any]
) -> ExpertUtilisation:
    """Measures how a model uses its experts.

    Any Linen model with `mtjax.nn.Gate`, `mtjax.nn.DSelectK` or `mtjax.nn.Experts`
    inside, or with modules that sow `"gates"` of shape `(batch, gates, experts)` or
    `"experts"` of shape `(batch, experts, width)` in `"intermediates"`.

    Args:
      model: of which `model.apply(variables, batch)` is computed, without training.
      variables: `{"params": ...}` and what else the model has.
      batches: of inputs; batches of one size compile once.

    Returns:
      Means over all examples. An output counts as zero below 1e-6.

    Raises:
      ValueError: if there is no batch, or the model has neither gates nor experts.

    Example:
      >>> import jax
      >>> from mtjax.nn import MMoE
      >>> model = MMoE(tasks=("click", "like"), num_experts=4)
      >>> x = jax.random.normal(jax.random.key(0), (32, 6))
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> use = expert_utilisation(model, {"params": params}, [x[:16], x[16:]])
      >>> print({k: w.shape for k, w in use.weights.items()}, list(use.zero_rate))
      {'task_gates': (2, 4)} ['experts_0']
    """

    def sums(sown):
        found, size = {}, 0
        for path, kind, array in _sown(sown):
            size = len(array)
            x = array.astype(jnp.float32)
            if kind == "gates":
                found[path, "weights"] = jnp.sum(x, axis=0)
            else:
                # Means over features first: sums over examples alone remain.
                parts = {
                    "zero_rate": jnp.mean(jnp.abs(x) < 1e-6, axis=2),
                    "mean": jnp.mean(x, axis=2),
                    "square": jnp.mean(x**2, axis=2),
                }
                found |= {(path, k): jnp.sum(v, axis=0) for k, v in parts.items()}
        return found, size

    means = mean_of_sown(model, variables, batches, sums)
    if not means:
        raise ValueError(
            "`batches` must hold an example and `model` must have gates or experts, "
            "got none; `mtjax.nn.Gate` and `mtjax.nn.Experts` sow what is read here."
        )
    of = lambda name: {path: v for (path, n), v in means.items() if n == name}
    mean, square = of("mean"), of("square")
    variance = {k: np.maximum(square[k] - mean[k] ** 2, 0.0) for k in mean}
    return ExpertUtilisation(of("weights"), of("zero_rate"), mean, variance)


def _sown(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Path of the module, kind and array of all that gates and experts have sown."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _sown(value, f"{path}/{name}" if path else name)
        elif name in ("gates", "experts"):
            # A module that is called twice sows twice.
            for i, array in enumerate(value):
                yield (f"{path}#{i}" if i else path), name, array
