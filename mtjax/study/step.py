"""The training step of a method, with all the data that it asks for."""

import optax

from mtjax.study.methods import Method
from mtjax.study.setting import Setting
from mtjax.training import make_train_step
from mtjax.training.step import StepFn


def make_step(
    setting: Setting, method: Method, tx: optax.GradientTransformation
) -> StepFn:
    """Builds `step(state, data) -> (state, metrics)`.

    Args:
      setting: model, losses and data.
      method: what `tx` begins with.
      tx: the method's balancer and its optimizer.

    Returns:
      The step, which takes what `Setting.data_for` returns. Further batches are drawn
      from the same data as the first, each with its own key.
    """
    step = make_train_step(setting.losses_fn, tx, with_key=True)

    def step_with_needs(state, data):
        train, held_out = data
        resampled = [train] * method.further
        return step(state, train, resampled=resampled, validation=held_out)

    return step_with_needs
