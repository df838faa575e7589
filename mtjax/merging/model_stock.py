"""Model Stock: how far to go towards the average, told by the angles."""

from mtjax.merging.merger import Leaf, Merger, Total, add_up, step
from mtjax.merging.slerp import inner_products


def model_stock() -> Merger:
    r"""Moves every parameter from the base towards the average of the models.

    With T models and the mean cosine $c$ of their task vectors, per parameter,

    $$\theta = \theta_0 + \frac{T c}{1 + (T - 1) c} \cdot \frac{1}{T} \sum_t \tau_t$$

    Returns:
      The method. It has no hyperparameters; negative mean cosines count as 0 and leave
      the base.

    References:
      Jang et al., "Model Stock: All We Need Is Just a Few Fine-Tuned Models",
      ECCV, 2024.
    """

    def share(products, size):
        number = len(products)
        lengths = products.diagonal() ** 0.5
        lengths = lengths + (lengths == 0)
        pairs = products / (lengths[None] * lengths[:, None])
        cosine = 1.0
        if number > 1:
            cosine = (pairs.sum() - pairs.trace()) / (number * (number - 1))
        cosine = cosine * (cosine > 0)
        return cosine / (1 + (number - 1) * cosine)

    def apply(leaf: Leaf, share):
        return share * add_up(leaf.vectors)

    products = Total(lambda leaf: inner_products(leaf.vectors), share)
    return step(apply, products, scope="tensor")
