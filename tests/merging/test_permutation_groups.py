"""Symmetries of models: found where they are, and only there."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.merging.align import permute
from mtjax.merging.permutation_groups import permutation_groups
from mtjax.nn import MLP, LeNet, ViT

KEY = jax.random.key(0)


def ones(**shapes):
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def found(groups):
    """Per group the members in short: "path axis", with the factors if there are."""
    short = lambda m: (
        f"{m.path} {m.axis}"
        + ("" if len(m.factors) == 1 else f" {m.factors}[{m.place}]")
    )
    return [{short(m) for m in group.members} for group in groups]


def fixed(groups):
    return {f"{x.path} {x.axis}": x.reason for x in groups.fixed}


class WithHead(nn.Module):
    encoder: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(self.encoder(x))


class Residual(nn.Module):
    """Blocks with all that residual networks have: norms, a skip, a projection."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for i in range(2):
            h = nn.GroupNorm(2, name=f"group_norm_{i}")(nn.relu(x))
            h = nn.Conv(6, (3, 3), name=f"narrow_{i}")(h)
            h = nn.BatchNorm(use_running_average=True, name=f"norm_{i}")(h)
            x = x + nn.Conv(4, (1, 1), name=f"wide_{i}")(nn.silu(h))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.Conv(12, (3, 3), feature_group_count=4, name="depthwise")(x)
        return nn.Dense(3, name="head")(jnp.max(x, axis=(1, 2)))


class Words(nn.Module):
    """A look-up, a recurrence and remat."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 5, name="table")(tokens)
        x = nn.remat(nn.Dense)(6, name="dense")(x)
        x = nn.RNN(nn.SimpleCell(4), name="recurrent")(x)
        return nn.Dense(3, name="head")(x[:, -1])


class Attention(nn.Module):
    """Linen's attention, with heads in an axis of their own, and a mask."""

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = nn.Dense(8, name="in")(x)
        x = x + nn.MultiHeadAttention(2, name="attention")(nn.RMSNorm()(x), mask=mask)
        return nn.Dense(3, name="head")(x)


IMAGES = jax.random.normal(KEY, (2, 8, 8, 1))
MODELS = {
    "mlp": (WithHead(MLP((5, 6))), jax.random.normal(KEY, (2, 4))),
    "lenet": (WithHead(LeNet((4, 6), 5)), IMAGES),
    "residual": (Residual(), IMAGES),
    "vit": (WithHead(ViT(4, width=12, depth=2, heads=3, hidden=7)), IMAGES),
    "words": (Words(), jnp.arange(6).reshape(2, 3)),
    "attention": (Attention(), jax.random.normal(KEY, (2, 3, 4))),
}


def variables_of(model, inputs):
    """Random everywhere, so that no two units are alike."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, KEY, inputs))
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.uniform(0.2, 1.0, x.shape), jnp.float32)
    return tree.unflatten([draw(x) for x in leaves])


@pytest.mark.parametrize("name", MODELS)
def test_all_permutations_leave_the_function_as_it_is(name):
    model, inputs = MODELS[name]
    variables = variables_of(model, inputs)
    groups = permutation_groups(model.apply, variables, inputs)
    rng = np.random.default_rng(1)
    # Never the identity.
    permutations = [np.roll(rng.permutation(g.size), 1) for g in groups]
    changed = permute(variables, groups, permutations)
    apply = jax.jit(model.apply)
    before, after = apply(variables, inputs), apply(changed, inputs)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), variables, changed)
    assert sum(jax.tree.leaves(moved)) > len(groups)


def groups_of(name):
    model, inputs = MODELS[name]
    params = jax.eval_shape(model.init, KEY, inputs)
    return permutation_groups(model.apply, params, inputs)


def with_prefix(groups, prefix="params/"):
    return [{member.removeprefix(prefix) for member in g} for g in found(groups)]


def test_groups_of_an_mlp():
    def mlp(params, x):
        h = jnp.tanh(x @ params["a"] + params["bias"][None])
        return jax.nn.softmax(h @ params["b"])

    params = ones(a=(3, 4), bias=(4,), b=(4, 4))
    groups = permutation_groups(mlp, params, jnp.ones((2, 3)))
    assert found(groups) == [{"a 1", "bias 0", "b 0"}]
    assert [len(groups), groups[0].size] == [1, 4]
    assert fixed(groups) == {
        "a 0": "axis 1 of input 0",
        "b 1": "axis 1 of the output",
    }
    assert str(groups).splitlines() == [
        "group 0, size 4",
        "  a, axis 1",
        "  b, axis 0",
        "  bias, axis 0",
        "fixed",
        "  a, axis 0: axis 1 of input 0",
        "  b, axis 1: axis 1 of the output",
    ]


def test_groups_of_linen_mlp():
    assert with_prefix(groups_of("mlp")) == [
        {
            "encoder/Dense_0/bias 0",
            "encoder/Dense_0/kernel 1",
            "encoder/Dense_1/kernel 0",
        },
        {"encoder/Dense_1/bias 0", "encoder/Dense_1/kernel 1", "head/kernel 0"},
    ]


def test_flattened_images_move_in_blocks():
    conv_0, conv_1 = "encoder/Conv_0/", "encoder/Conv_1/"
    dense = "encoder/Dense_0/"
    groups = groups_of("lenet")
    assert with_prefix(groups) == [
        {conv_0 + "bias 0", conv_0 + "kernel 3", conv_1 + "kernel 2"},
        {conv_1 + "bias 0", conv_1 + "kernel 3", dense + "kernel 0 (2, 2, 6)[2]"},
        {dense + "bias 0", dense + "kernel 1", "head/kernel 0"},
    ]
    assert "encoder/Dense_0/kernel, axis 0 as 2 x 2 x [6]" in str(groups)


def test_groups_of_a_residual_network():
    # The group of the first of these that it has: path, axis, factor.
    firsts = {
        "params/stem/bias 0 0": "groups",
        "params/stem/bias 0 1": "within",
        "params/narrow_0/bias 0 0": "inner_0",
        "params/narrow_1/bias 0 0": "inner_1",
        "params/depthwise/bias 0 2": "depthwise",
    }
    groups = {}
    for group in groups_of("residual"):
        paths = {f"{m.path} {m.axis} {m.place}" for m in group.members}
        name = next(name for first, name in firsts.items() if first in paths)
        groups[name] = (group.size, paths)
    assert len(groups) == len(groups_of("residual")) == len(firsts)
    # The group norm's groups, and channels within them: 2 x 2 channels.
    stream = {
        "wide_0/bias 0",
        "wide_0/kernel 3",
        "group_norm_0/scale 0",
        "stem/kernel 3",
    }
    stream |= {
        "narrow_1/kernel 2",
        "wide_1/bias 0",
        "depthwise/bias 0",
        "head/kernel 0",
    }
    for place, name in enumerate(("groups", "within")):
        size, paths = groups[name]
        assert size == 2
        assert {f"params/{member} {place}" for member in stream} <= paths
    # Each block's own channels, with the statistics of its norm.
    for i in range(2):
        size, paths = groups[f"inner_{i}"]
        norm = {f"params/norm_{i}/{x} 0 0" for x in ("scale", "bias")}
        stats = {f"batch_stats/norm_{i}/{x} 0 0" for x in ("mean", "var")}
        ends = {f"params/narrow_{i}/{x} 0" for x in ("bias 0", "kernel 3")}
        assert size == 6
        assert paths == norm | stats | ends | {f"params/wide_{i}/kernel 2 0"}
    # Three kernels per channel.
    names = ("params/depthwise/bias 0 2", "params/depthwise/kernel 3 2")
    assert groups["depthwise"] == (3, {*names, "params/head/kernel 0 2"})


def test_groups_of_a_vision_transformer():
    groups = with_prefix(groups_of("vit"))
    stream, *rest = groups
    assert {
        *("encoder/patches/kernel 1", "encoder/patches/bias 0", "encoder/positions 1"),
        *("encoder/norm/scale 0", "encoder/norm/bias 0", "head/kernel 0"),
    } <= stream
    hidden = 0
    for i in range(2):
        block = f"encoder/block_{i}/"
        norms = {
            f"{block}LayerNorm_{j}/{x} 0" for j in (0, 1) for x in ("scale", "bias")
        }
        reads = {f"{block}attention/{x}/kernel 0" for x in ("query", "key", "value")}
        writes = {f"{block}{x}/kernel 1" for x in ("attention/output", "mlp_out")}
        assert norms | reads | writes | {block + "mlp_in/kernel 0"} <= stream
        # All hidden units of the MLP.
        ends = {block + "mlp_in/bias 0", block + "mlp_in/kernel 1"}
        assert ends | {block + "mlp_out/kernel 0"} in rest
        # Whole heads, and features within heads: queries with keys, values with output.
        ends = {
            f"{block}attention/{x} (3, 4)"
            for x in ("query/kernel 1", "query/bias 0", "key/kernel 1", "key/bias 0")
        }
        values = {
            f"{block}attention/{x} (3, 4)"
            for x in ("value/kernel 1", "value/bias 0", "output/kernel 0")
        }
        assert {x + "[0]" for x in ends | values} in rest
        assert {x + "[1]" for x in ends} in rest
        assert {x + "[1]" for x in values} in rest
        hidden += 4
    assert len(rest) == hidden


def test_recurrent_units_have_one_order_on_both_axes():
    table, dense, recurrent = groups_of("words")
    by_size = {g.size: set(found([g])[0]) for g in (table, dense, recurrent)}
    cell = "params/SimpleCell_0/"
    assert by_size[5] == {"params/table/embedding 1", "params/dense/kernel 0"}
    assert by_size[6] == {
        *("params/dense/bias 0", "params/dense/kernel 1", cell + "i/kernel 0")
    }
    assert {cell + "h/kernel 0", cell + "h/kernel 1", "params/head/kernel 0"} < by_size[
        4
    ]
    assert "`gather` along it" in fixed(groups_of("words"))["params/table/embedding 0"]


OPERATIONS = {
    "concatenate": lambda h: jnp.concatenate([h, h], axis=1)[:, :4],
    "cumsum": lambda h: jnp.cumsum(h, axis=1),
    "slice": lambda h: jnp.repeat(h[:, :2], 2, axis=1),
    "rev": lambda h: h[:, ::-1],
    "sort": lambda h: jnp.sort(h, axis=1),
    "pad": lambda h: jnp.pad(h, ((0, 0), (1, 0)))[:, :4],
    "argmax": lambda h: h * (jnp.argmax(h, axis=1) > 1)[:, None],
    "split": lambda h: jnp.tile(jnp.split(h, 2, axis=1)[0], (1, 2)),
    "unstack": lambda h: jnp.tile(jnp.unstack(h, axis=1)[0][:, None], (1, 4)),
    "dynamic_slice": lambda h: (
        jax.lax.dynamic_slice(h, (0, 0), (2, 3)) @ jnp.ones((3, 4))
    ),
    "dynamic_update_slice": lambda h: jax.lax.dynamic_update_slice(
        h, jnp.ones((2, 2)), (0, 1)
    ),
    "stack": lambda h: h * jnp.stack([jnp.ones(2)] * 4, axis=1),
    "fft, which has no rule": lambda h: jnp.fft.fft(h, axis=1).real,
    "a constant": lambda h: h * np.arange(4.0, dtype=np.float32)[None],
    "iota": lambda h: h * jnp.arange(4.0)[None],
    "reduce_window_sum": lambda h: nn.avg_pool(h[..., None], (2,), padding="SAME")[
        ..., 0
    ],
    "a reshape from (2, 3, 4) to (2, 4, 3)": lambda h: jnp.swapaxes(
        jnp.broadcast_to(h[:, None], (2, 3, 4)).reshape(2, 4, 3), 1, 2
    ).sum(1),
    "which has no rule": lambda h: h * jax.random.bernoulli(KEY, 0.5, h.shape),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_depends_on_the_order_fixes_it(name):
    def apply_fn(params, x):
        h = jnp.tanh(x @ params["a"])
        return (
            OPERATIONS[name](h) @ params["b"] + jnp.tanh(x @ params["c"]) @ params["d"]
        )

    params = ones(a=(3, 4), b=(4, 2), c=(3, 4), d=(4, 2))
    groups = permutation_groups(apply_fn, params, jnp.ones((2, 3)))
    # What stands beside it is not touched.
    assert {"c 1", "d 0"} in found(groups)
    assert not any("a 1" in group for group in found(groups))
    assert name in fixed(groups)["a 1"].replace("`", "")


def test_operations_along_other_axes_change_nothing():
    def apply_fn(params, x):
        h = jnp.tanh(x @ params["a"])  # (2, 4)
        h = jnp.concatenate([h, h[:1], jnp.cumsum(h, axis=0)])[::-1]
        h = jnp.pad(jnp.sort(h, axis=0), ((1, 0), (0, 0)))[jnp.array([0, 2])]
        h = jax.lax.dynamic_update_slice(h, h[:1], (1, 0))
        h = jax.lax.optimization_barrier(h) * jnp.linspace(0.0, 1.0, 2)[:, None]
        h = jnp.stack(jnp.split(h, 2, axis=0)).reshape(2, 4)
        h = jnp.stack(jnp.unstack(jnp.tile(h, (2, 1)), axis=0)[1:3])
        return h @ params["b"]

    params = ones(a=(3, 4), b=(4, 2))
    groups = permutation_groups(apply_fn, params, jnp.ones((2, 3)))
    assert found(groups) == [{"a 1", "b 0"}]


@jax.custom_vjp
def scaled(h, factor):
    return h * factor


scaled.defvjp(lambda h, factor: (h * factor, h), lambda h, g: (g, g * h))


def test_loops_and_branches():
    def layers(params, x):
        step = lambda h, w: (jnp.tanh(h @ w), h.sum(0))
        h, sums = jax.lax.scan(step, x @ params["a"], params["stack"])
        h = jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + params["add"], h)
        h = jax.lax.cond(h.sum() > 0, lambda h: scaled(h, params["factor"]), jnp.sin, h)
        return h @ params["b"] + sums.sum()

    params = ones(a=(3, 4), stack=(5, 4, 4), add=(1, 4), factor=(1, 4), b=(4, 2))
    groups = permutation_groups(layers, params, jnp.ones((2, 3)))
    members = {"a 1", "stack 1", "stack 2", "add 1", "factor 1", "b 0"}
    assert found(groups) == [members]
    assert fixed(groups)["stack 0"] == "`scan` along it"


def test_reshapes_that_split_and_join_leave_products():
    def apply_fn(params, x):
        h = (x @ params["a"]).reshape(2, 6, 2)  # from 12
        h = h.reshape(2, 2, 3, 2) * params["scale"][None, :, None, None]
        return h.reshape(2, 12) @ params["b"]

    params = ones(a=(3, 12), scale=(2,), b=(12, 2))
    groups = permutation_groups(apply_fn, params, jnp.ones((2, 3)))
    at = lambda place: {f"{x} (2, 3, 2)[{place}]" for x in ("a 1", "b 0")}
    assert found(groups) == [at(0) | {"scale 0"}, at(1), at(2)]


def test_parameters_that_are_not_used_stay_as_they_are():
    @jax.jit
    def apply_fn(params, x):
        unused = jax.jit(lambda a, b: (a, b @ b))
        h, _ = unused(jnp.tanh(x @ params["a"]), params["in_call"])
        return h @ params["b"]

    params = ones(a=(3, 4), b=(4, 2), in_call=(4, 4), head=(2, 5))
    groups = permutation_groups(apply_fn, params, jnp.ones((2, 3)))
    assert found(groups) == [{"a 1", "b 0"}]
    assert fixed(groups)["head 1"] == "not used"
    assert fixed(groups)["in_call 0"] == "not used"


def test_groups_of_some_parameters():
    groups = groups_of("vit")
    hidden = groups.having(r"mlp_in/bias")
    assert [g.size for g in hidden] == [7, 7]
    assert hidden.leaves == groups.leaves


def test_axes_of_one_element_and_empty_ones_are_left_out():
    def apply_fn(params, x):
        return (x @ params["a"]) @ params["b"] + params["c"].sum() + params["step"]

    params = ones(a=(3, 1), b=(1, 2), c=(0, 1), step=())
    groups = permutation_groups(apply_fn, params, jnp.ones((2, 3)))
    assert [g.size for g in groups] == [0]
    assert "a, axis 1" not in str(groups)
