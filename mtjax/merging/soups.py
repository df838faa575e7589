"""Model soups: averages of fine-tunings of one task."""

from collections.abc import Callable, Mapping, Sequence

from jaxtyping import PyTree

from mtjax.merging.average import average
from mtjax.merging.match import by_name


def greedy_soup(
    models: Mapping[str, PyTree] | Sequence[PyTree],
    score: Callable[[PyTree], float],
) -> tuple[PyTree, list[str]]:
    """Averages the models that make the average better, from the best one on.

    Models are tried in the order of their own scores; one is kept if the average with
    it does not score less. The uniform soup is `average()`.

    Args:
      models: fine-tunings of one task, by name or in a sequence.
      score: of parameters on validation data; higher is better. Called at most twice
        per model.

    Returns:
      The soup, which scores at least what the best model does, and the names (or
      numbers) of the models in it.

    Example:
      >>> soup, chosen = greedy_soup([1.0, 2.0, 9.0], lambda x: -abs(x - 1.4))
      >>> float(soup), chosen
      (1.5, ['0', '1'])

    References:
      Wortsman et al., "Model Soups: Averaging Weights of Multiple Fine-Tuned Models
      Improves Accuracy without Increasing Inference Time", ICML, 2022.
    """
    named = by_name(models)
    scores = {name: score(model) for name, model in named.items()}
    order = sorted(named, key=lambda name: -scores[name])
    chosen, best = order[:1], scores[order[0]]
    soup = named[order[0]]
    for name in order[1:]:
        tried = average()(None, [named[n] for n in (*chosen, name)])
        if (found := score(tried)) >= best:
            chosen, best, soup = [*chosen, name], found, tried
    return soup, chosen
