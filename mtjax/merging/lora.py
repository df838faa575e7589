"""Low-rank adapters as task vectors."""

import math
import re
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

_NAME = re.compile(r"(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight$")


def lora_task_vector(
    adapter: Mapping[str, Float[Array, "..."]],
    *,
    alpha: float,
    rank_stabilised: bool = False,
) -> dict[str, Float[Array, "out in"]]:
    r"""The change of weights that an adapter stands for, formed exactly.

    $$\Delta W = \frac{\alpha}{r} B A$$

    Averaging A and B of several adapters by themselves is not averaging $\Delta W$: the
    product of sums has cross terms. Merge these vectors instead.

    Args:
      adapter: arrays by name, as PEFT stores them: `{path}.lora_A.weight`, `(r, in)`,
        and `{path}.lora_B.weight`, `(out, r)`, with or without an adapter's name in
        front of `weight` and `base_model.model.` in front of the path.
      alpha: `lora_alpha` of the adapter's configuration.
      rank_stabilised: divide by the square root of the rank (`use_rslora`).

    Returns:
      By `{path}.weight` the change, `(out, in)`, in float32. Add it to the base to get
      a model that can be merged with others.

    Raises:
      ValueError: if a half is missing, shapes do not fit, or other arrays are there
        (biases, embeddings, magnitudes of DoRA), which this is not the whole of.

    Example:
      >>> adapter = {"q.lora_A.weight": jnp.ones((2, 3))}
      >>> adapter["q.lora_B.weight"] = jnp.ones((4, 2))
      >>> vector = lora_task_vector(adapter, alpha=4.0)
      >>> vector["q.weight"].shape, float(vector["q.weight"][0, 0])
      ((4, 3), 4.0)

    References:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR, 2022.
    """
    halves: dict[str, dict[str, Array]] = {}
    for name, values in adapter.items():
        found = _NAME.match(name)
        if found is None:
            raise ValueError(
                f"`adapter` must hold lora_A and lora_B weights alone, got {name!r}."
            )
        path = found[1].removeprefix("base_model.model.")
        halves.setdefault(path, {})[found[2]] = jnp.asarray(values, jnp.float32)
    vectors = {}
    for path, pair in halves.items():
        if len(pair) < 2:
            (other,) = {"A", "B"} - pair.keys()
            raise ValueError(f"`adapter` has no lora_{other} for {path!r}.")
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"`adapter` of {path!r} must be (r, in) and (out, r), got {a.shape} "
                f"and {b.shape}."
            )
        rank = a.shape[0]
        scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
        product = jnp.matmul(b, a, precision="highest")
        vectors[f"{path}.weight"] = scale * product
    return vectors
