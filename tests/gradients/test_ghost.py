"""The ghost engine gives the numbers of the stacked one, without its gradients."""

import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import mtjax
from mtjax.gradients._products import Product

KEYS = jax.random.split(jax.random.key(3), 12)


def normal(key, *shape):
    return 0.5 * jax.random.normal(KEYS[key], shape)


def dense():
    params = {"w": [normal(0, 9, 12), normal(1, 12, 12)], "b": normal(2, 12)}
    params |= {"a": normal(3, 12), "c": normal(4, 12), "unused": jnp.ones(2)}

    def losses_fn(p, x):
        h = jnp.tanh(x @ p["w"][0] + p["b"][None])
        h = jax.nn.relu(h @ p["w"][1]) @ p["w"][1].T  # used twice, and transposed
        return {
            "a": jnp.mean((h @ p["a"]) ** 2),
            "b": jnp.mean(jnp.sin(h)),
            "c": jnp.sum(h @ p["c"]),
        }

    return params, losses_fn, (normal(5, 4, 9),)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=(2, 2), use_bias=False)(x))
        x = nn.relu(nn.GroupNorm(2)(nn.Conv(6, (3, 3), kernel_dilation=2)(x)))
        x = nn.ConvTranspose(6, (2, 2), strides=(2, 2))(x)
        x = nn.Conv(6, (3, 3), feature_group_count=2)(x)
        z = nn.Dense(5)(x.reshape(len(x), -1))
        return {"a": jnp.mean(z**2), "b": jnp.mean(nn.Dense(1)(jnp.sin(z)))}


def convolutions():
    x = normal(0, 2, 6, 6, 3)
    return Convolutions().init(KEYS[1], x), Convolutions().apply, (x,)


class LanguageModel(nn.Module):
    """A transformer that reads and writes with one table."""

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(11, 6)
        x = table(ids)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(y, y)
        logits = table.attend(x)
        words = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1)
        return {
            "words": -jnp.mean(words),
            "length": jnp.mean(nn.Dense(1)(x.mean(1)) ** 2),
            "tone": jnp.sum(jnp.cos(x)),
        }


def language_model():
    ids = jax.random.randint(KEYS[0], (2, 4), 0, 11)
    return LanguageModel().init(KEYS[1], ids), LanguageModel().apply, (ids,)


def loops():
    params = {"layers": {"w": normal(0, 3, 4, 4), "b": normal(1, 3, 4)}}
    params |= {"cell": normal(2, 4, 4), "shift": normal(3, 4), "table": normal(4, 5, 4)}

    def losses_fn(p, x, ids):
        layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w["w"] + w["b"][None]), None))
        h, _ = jax.lax.scan(layer, x, p["layers"])

        def cell(h, word):
            h = jnp.tanh(h @ p["cell"] + p["table"][word] + p["shift"][None])
            return h, h

        h, states = jax.lax.scan(cell, h, ids)
        return {
            "last": h.sum(),
            "all": (states**2).mean(),
            "first": (states[0] * x).sum(),
        }

    ids = jnp.array([[0, 1], [1, 1], [4, 2]])
    return params, losses_fn, (normal(5, 2, 4), ids)


def not_recognised():
    """Weights that are used through functions, slices, branches and look-ups."""
    params = {"w": normal(0, 6, 6), "v": normal(1, 6, 6), "table": normal(2, 7, 3)}

    def losses_fn(p, x):
        unit = p["w"] / jnp.linalg.norm(p["w"])
        h = jnp.tanh(x @ unit + x @ (0.5 * p["v"])[:, ::-1])
        h = jax.lax.cond(
            x.sum() > 0, lambda h: h @ p["v"][:, :3], lambda h: h[:, :3], h
        )
        far = p["table"].at[jnp.array([-1, 3, 99])].get(mode="fill", fill_value=0)
        near = jnp.take(p["table"], jnp.array([0, 3, 99]), axis=0, mode="clip")
        return {
            "a": jnp.mean(h**2),
            "b": jnp.sum(far * near),
            "c": jnp.mean(h @ near.T),
        }

    return params, losses_fn, (jnp.abs(normal(3, 3, 6)),)


MODELS = (dense, convolutions, language_model, loops, not_recognised)


@pytest.fixture(params=["by rule", "always kept"])
def kept(request, monkeypatch):
    """As the rule decides, or whatever can be kept as a product is."""
    if request.param == "always kept":
        monkeypatch.setattr(Product, "operations", lambda self, k, devices=1: (1, 0))


def views(params, losses_fn, batch, engine, **options):
    grad_fn = mtjax.value_and_task_grads(losses_fn, engine=engine, **options)

    def compute(params, *batch):
        _, grads = grad_fn(params, *batch)
        weights = jnp.arange(1.0, len(grads.tasks) + 1.0)
        return grads.gramian(), grads.scale(weights).combine(1 / weights)

    return compute


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_equals_the_stacked_engine(make, kept, pullbacks):
    params, losses_fn, batch = make()

    @jax.jit
    def both(params, *batch):
        return [
            views(params, losses_fn, batch, engine)(params, *batch)
            for engine in ("stacked", "ghost")
        ]

    (expected, update), (gramian, from_cotangents) = both(params, *batch)
    norms = np.sqrt(np.diagonal(expected))
    np.testing.assert_allclose(
        gramian / np.outer(norms, norms), expected / np.outer(norms, norms), atol=1e-5
    )
    chex.assert_trees_all_close(from_cotangents, update, rtol=1e-4, atol=1e-5)


def test_bfloat16(kept):
    params, losses_fn, (x,) = dense()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), (params, x))
    gramian, update = jax.jit(views(half[0], losses_fn, half[1:], "ghost"))(*half)
    assert gramian.dtype == jnp.float32
    chex.assert_trees_all_equal_dtypes(update, half[0])
    exact, _ = views(params, losses_fn, (x,), "stacked")(params, x)
    np.testing.assert_allclose(gramian, exact, rtol=0.1, atol=0.05 * exact.max())


WIDTHS = (20, 30, 40, 50)
WEIGHTS = set(itertools.pairwise(WIDTHS))


def deep(examples):
    params = {"w": [normal(i, *shape) for i, shape in enumerate(sorted(WEIGHTS))]}
    params["heads"] = {t: normal(6 + i, 50) for i, t in enumerate("abc")}

    def losses_fn(p, x):
        for w in p["w"]:
            x = jnp.tanh(x @ w)
        return {t: jnp.mean((x @ head) ** 2) for t, head in p["heads"].items()}

    return params, losses_fn, (normal(9, examples, 20),)


def program(params, losses_fn, batch, engine):
    """What is computed to find a Gramian."""
    grad_fn = mtjax.value_and_task_grads(losses_fn, engine=engine)
    find = lambda *args: grad_fn(*args)[1].gramian()
    return jax.make_jaxpr(find)(params, *batch).jaxpr


def shapes_in(*problem):
    return [v.aval.shape for eqn in program(*problem).eqns for v in eqn.outvars]


def test_no_weight_gradient_is_formed_where_examples_are_few():
    problem = deep(examples=4)
    assert not WEIGHTS & set(shapes_in(*problem, "ghost"))
    assert set(shapes_in(*problem, "stacked")) >= WEIGHTS


@pytest.mark.parametrize(("examples", "saves"), [(4, True), (500, False)])
def test_auto_is_ghost_where_it_saves_operations(examples, saves):
    formed = WEIGHTS & set(shapes_in(*deep(examples), "auto"))
    assert formed == (set() if saves else WEIGHTS)


def test_a_head_is_passed_back_by_its_own_task_alone():
    products = [e for e in program(*deep(4), "ghost").eqns if "dot" in e.primitive.name]
    forward, heads, layers = 3 + 3, 3, 2 * 3
    factors = 3 + 3 * 3  # of the inputs with one another, and with each task's
    assert len(products) == forward + heads + layers + factors


def test_what_remat_computes_again_is_computed_once():
    params, _, (x,) = deep(examples=4)
    layer = jax.checkpoint(lambda p, x: jnp.sin(x @ p["w"][0]))

    def losses_fn(p, x):
        h = layer(p, x)
        return {t: jnp.mean((h @ head[:30]) ** 2) for t, head in p["heads"].items()}

    names = [e.primitive.name for e in program(params, losses_fn, (x,), "ghost").eqns]
    assert "optimization_barrier" in names
    assert names.count("cos") == 1


def test_gramian_inside_a_branch_and_update_outside():
    params, losses_fn, batch = deep(examples=4)

    @jax.jit
    def compute(params, x, wanted):
        _, grads = mtjax.value_and_task_grads(losses_fn, engine="ghost")(params, x)
        gramian = jax.lax.cond(wanted, grads.gramian, lambda: jnp.zeros((3, 3)))
        return gramian, grads.combine(jnp.ones(3))

    gramian, update = compute(params, *batch, True)
    expected, plain = views(params, losses_fn, batch, "stacked")(params, *batch)
    np.testing.assert_allclose(gramian, expected, rtol=1e-4)
    chex.assert_trees_all_close(update["w"], plain["w"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("make", [dense, language_model], ids=lambda m: m.__name__)
def test_devices_exchange_factors(make, kept, check_vma):
    params, losses_fn, batch = make()
    batch = jax.tree.map(lambda x: x[jnp.arange(8) % len(x)], batch)
    mean = lambda p, *b: jax.tree.map(lambda loss: loss / 1.0, losses_fn(p, *b))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    on_devices = jax.shard_map(
        views(params, mean, batch, "ghost", axis_name="data"),
        mesh=mesh,
        in_specs=(P(), *[P("data")] * len(batch)),
        out_specs=P(),
        check_vma=check_vma,
    )
    halves = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch) for i in (0, 1)]

    def expected_losses(p):
        first, second = (losses_fn(p, *half) for half in halves)
        return jax.tree.map(lambda a, b: (a + b) / 2, first, second)

    expected = views(params, expected_losses, (), "stacked")(params)
    found = jax.jit(on_devices)(params, *batch)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
