"""DSelect-k: gates that use at most k experts, and learn which by plain gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def smooth_step(
    t: Float[Array, "*shape"], width: float = 1.0
) -> Float[Array, "*shape"]:
    r"""A cubic step that is exactly 0 or 1 outside a window.

    .. math:: S(t) = -\frac{2 t^3}{\gamma^3} + \frac{3 t}{2 \gamma} + \frac12
        \quad (|t| < \gamma / 2)

    Args:
      t: any.
      width: :math:`\gamma > 0`, of the window. Outside it the gradient is 0, as
        intended: a settled choice stays.

    Returns:
      In [0, 1].

    Example:
      >>> print(smooth_step(jnp.array([-0.5, 0.0, 0.25, 0.5])))
      [0.      0.5     0.84375 1.     ]
    """
    inside = jnp.clip(t / width, -0.5, 0.5)
    # Clipping has half a gradient at the ends, where the cubic has none.
    return -2 * inside**3 + 1.5 * inside + 0.5


class DSelectK(nn.Module):
    r"""Gates that mix k selectors, each a binary code of one expert.

    .. math::
      q = \sum_{s=1}^k softmax(w)_s \, r(z^s), \quad
      r(z)_i = \prod_j S(z_j)^{b_{ij}} (1 - S(z_j))^{1 - b_{ij}}

    with the bits :math:`b_{ij}` of i, and S `smooth_step`. Once every S is 0 or 1, a
    gate has at most k weights that are not 0. Use it as `MMoE(...,
    gate=functools.partial(DSelectK, k=2))`; weights are sown as those of `Gate`.

    What to add to the loss, times a small weight such as 1e-6, is sown as `"dselect_k"`
    in the collection `"losses"`: the selectors' entropies and, where the number of
    experts is no power of two, :math:`1 / \sum_i r_i`, which keeps mass on the codes
    that have an expert. There, rows sum to less than 1 until that is so.

    Attributes:
      num_gates: number of gates.
      num_experts: n.
      k: number of selectors, in [1, n].
      width: :math:`\gamma` of `smooth_step`.
      per_example: False learns one choice for all inputs.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> gate = DSelectK(num_gates=2, num_experts=4, k=2)
      >>> x = jnp.ones((3, 5))
      >>> variables = gate.init(jax.random.key(0), x)
      >>> weights = gate.apply({"params": variables["params"]}, x)
      >>> print(weights.shape, weights.sum(-1).round(5)[0])
      (3, 2, 4) [1. 1.]

    References:
      DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to
      Multi-Task Learning, NeurIPS 2021, sections 3 and 4; initial values and the term
      for unused codes are those of the authors' code.
    """

    num_gates: int
    num_experts: int
    k: int = 2
    width: float = 1.0
    per_example: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch features"] | Float[Array, "batch gates features"],
        *,
        train: bool = False,
    ) -> Float[Array, "batch gates experts"]:
        """The weight of every expert in every gate.

        Args:
          x: read by all gates, or one input for each of them.
          train: changes nothing here; gates have this argument.

        Returns:
          Non-negative weights.
        """
        del train
        g, n, k = self.num_gates, self.num_experts, self.k
        if g < 1 or n < 1 or not 1 <= k <= n:
            raise ValueError(
                "`num_gates` and `num_experts` must be at least 1, and `k` in [1, "
                f"num_experts], got {g!r}, {n!r} and {k!r}."
            )
        bits = max(1, int(np.ceil(np.log2(n))))
        z = self._linear("codes", x, (k, bits), self.width / 100)
        w = self._linear("mixing", x, (k,), 0.05)
        code = np.arange(n)[:, None] >> np.arange(bits) & 1
        s = smooth_step(z, self.width)[:, :, :, None]
        factors = jnp.where(jnp.asarray(code, bool)[None, None, None], s, 1 - s)
        selected = jnp.prod(factors, axis=-1)
        weights = jnp.einsum("bgk,bgkn->bgn", jax.nn.softmax(w, axis=-1), selected)
        self.sow("losses", "dselect_k", _regulariser(selected, bits))
        weights = jnp.broadcast_to(weights, (x.shape[0], g, n))
        self.sow("intermediates", "gates", weights)
        return weights

    def _linear(self, name: str, x: Array, shape: tuple[int, ...], bound: float):
        """`(batch or 1, gates, *shape)`, linear in x or free."""
        # Uniform around 0: at first a code is undecided.
        init = lambda key, shape: jax.random.uniform(
            key, shape, minval=-bound, maxval=bound
        )
        size = int(np.prod(shape))
        if not self.per_example:
            return self.param(name, init, (self.num_gates, *shape))[None]
        kernel = self.param(name, init, (self.num_gates, x.shape[-1], size))
        terms = "bd,gdk->bgk" if x.ndim == 2 else "bgd,gdk->bgk"
        return jnp.einsum(terms, x, kernel).reshape(x.shape[0], self.num_gates, *shape)


def _regulariser(selected: Float[Array, "rows gates k experts"], bits: int) -> Array:
    """The mean over rows of entropies and, with unused codes, of one over the mass."""
    # The slope of p log p is infinite at 0.
    logarithm = jnp.log(jnp.where(selected > 0, selected, 1.0))
    total = -jnp.sum(selected * logarithm)
    if selected.shape[-1] != 2**bits:
        mass = jnp.sum(selected, axis=-1)
        total = total + jnp.sum(1 / jnp.maximum(mass, 1e-6))
    return total / len(selected)
