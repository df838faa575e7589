"""Dense layers with additions of several experts, weighted anew for every input."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtjax.merging.experts import Experts, as_tree
from mtjax.merging.vectors import merge

ApplyFn = Callable[[PyTree, Any], Any]
"""From parameters and a batch of inputs to what the model says about each of them."""

Branch = Any
"""Additions to a kernel: an array `(experts, inputs, outputs)`, or a pair of factors
`(experts, inputs, rank)` and `(experts, rank, outputs)`; to a bias: an array."""

Weights = (
    Float[Array, " experts"]
    | Callable[[str, Float[Array, "... inputs"]], Float[Array, " experts"]]
)


def dense_kernels(run: Callable[[], Any]) -> tuple[str, ...]:
    """The kernels of all dense layers that a Linen model runs.

    Args:
      run: applies the model, such as `lambda: model.apply({"params": params}, images)`.
        It is only traced.

    Returns:
      Their paths in `params`, such as `"block_0/query/kernel"`, in the order in which
      they are first used.

    Example:
      >>> model = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> dense_kernels(lambda: model.apply(params, jnp.ones((1, 4))))
      ('layers_0/kernel', 'layers_2/kernel')
    """
    found: dict[str, None] = {}

    def note(next_fun, args, kwargs, context):
        if (path := _kernel(context)) is not None:
            found[path] = None
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(run)
    return tuple(found)


def with_side_branches(
    run: Callable[[], Any], branches: Mapping[str, Branch], weights: Weights
) -> Any:
    r"""Runs a Linen model whose dense layers have weighted additions.

    $$y = x W + b + \sum_t w_t \, (x A_t B_t + c_t)$$

    is what a layer with the kernel $W + \sum_t w_t A_t B_t$ says, which is not formed.
    For weights that differ between the examples of a batch, call this for one example
    inside `jax.vmap`: the matrices are not copied, as merged kernels would be.

    Args:
      run: applies the model, such as `lambda: model.apply({"params": params}, images)`.
      branches: by path of a kernel in `params` $(A_t, B_t)$ as a pair of
        `(experts, inputs, rank)` and `(experts, rank, outputs)`, such as
        `mtjax.merging.low_rank.LowRank`, or their products in one array; by path of a
        bias $c_t$, `(experts, outputs)`.
      weights: $w$, or a function that makes them of the path of the kernel and of what
        the layer sees, each time that it runs.

    Returns:
      What `run` returns.

    Raises:
      ValueError: if a path is not that of a dense layer that the model runs.

    Example:
      >>> model, x = nn.Dense(2, use_bias=False), jnp.ones((1, 2))
      >>> params = {"params": {"kernel": jnp.eye(2)}}
      >>> branches = {"kernel": jnp.ones((1, 2, 2))}
      >>> run = lambda: model.apply(params, x)
      >>> print(with_side_branches(run, branches, jnp.array([0.5])))
      [[2. 2.]]
    """
    used = set()

    def add(next_fun, args, kwargs, context):
        outputs = next_fun(*args, **kwargs)
        kernel = _kernel(context) or ""
        bias = kernel.removesuffix("kernel") + "bias"
        if not kernel or not (found := {kernel, bias} & branches.keys()):
            return outputs
        used.update(found)
        inputs = kwargs["inputs"] if "inputs" in kwargs else args[0]
        now = weights(kernel, inputs) if callable(weights) else weights
        if kernel in branches:
            outputs += _added(inputs, branches[kernel], now).astype(outputs.dtype)
        if bias in branches:
            offset = jnp.einsum("t,to->o", now, branches[bias]).astype(outputs.dtype)
            outputs += jnp.broadcast_to(offset, outputs.shape)
        return outputs

    with nn.intercept_methods(add):
        outputs = run()
    if unknown := sorted(set(branches) - used):
        raise ValueError(
            "`branches` must name kernels or biases of dense layers that the model "
            f"runs, got {unknown}; `dense_kernels` lists the kernels."
        )
    return outputs


def apply_mixed(
    apply_fn: ApplyFn,
    experts: Experts,
    weights: Float[Array, "batch tasks"],
    inputs: PyTree,
) -> PyTree:
    r"""Runs the model $\theta^* + \sum_t w_t v_t$ of every example of a batch.

    Dense layers add their experts on the side, so that no kernel is merged for any
    example; biases, scales and whatever else is not the kernel of a dense layer are
    merged for each one.

    Args:
      apply_fn: applies a Linen model to a batch: `lambda params, x:
        model.apply({"params": params}, x)`, with the parameters of all experts.
      experts: the shared model and its changes.
      weights: $w$ of every example, in the order of `experts.tasks`.
      inputs: a batch, or a tree of them; examples do not depend on each other.

    Returns:
      What `apply_fn` returns.

    Raises:
      ValueError: if there is not one weight per expert.
    """
    if weights.shape[1] != len(experts.tasks):
        raise ValueError(
            f"`weights` must have one column for each of {experts.tasks}, got shape "
            f"{weights.shape}."
        )
    inputs = jax.tree.map(jnp.asarray, inputs)
    kernels = dense_kernels(lambda: apply_fn(experts.shared, inputs))
    branches = {p: experts.factors(p) for p in experts.paths if p in kernels}
    rows = {p: experts.rows(p) for p in experts.paths if p not in kernels}
    others = as_tree(experts.shared, rows)

    def one(weights, example):
        params = merge(experts.shared, others, weights)
        single = jax.tree.map(lambda x: x[None], example)
        run = lambda: apply_fn(params, single)
        found = with_side_branches(run, branches, weights)
        return jax.tree.map(lambda x: x[0], found)

    return jax.vmap(one)(weights, inputs)


def _kernel(context) -> str | None:
    """The path of the kernel, if a dense layer is called."""
    if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
        return "/".join((*context.module.path, "kernel"))
    return None


def _added(inputs, branch: Branch, weights):
    # Every step has one axis of experts, which stays in front of the matrices: a sum of
    # weighted matrices would have to be formed for each example.
    if isinstance(branch, tuple):
        left, right = branch
        thin = jnp.einsum("...i,tir->...tr", inputs, left)
        thin = jnp.einsum("...tr,t->...tr", thin, weights)
        return jnp.einsum("...tr,tro->...o", thin, right)
    wide = jnp.einsum("...i,t->...ti", inputs, weights)
    return jnp.einsum("...ti,tio->...o", wide, branch)
