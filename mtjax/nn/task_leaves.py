"""Which parameters of a ranker are shared, where arrays hold those of several tasks."""


def is_shared(path: str) -> bool:
    """Whether a parameter of the rankers in `mtjax.nn` is shared between tasks.

    Gates and experts of all tasks are one array, with an axis of tasks, which every
    loss reaches: `mtjax.value_and_task_grads` alone would take it to be shared. In
    modules whose name begins with `task_` every entry belongs to one task. Declared not
    shared, it follows its own task's gradient, as if every task had its own array.

    Args:
      path: of the leaf, such as `"params/task_gates/kernel"`.

    Returns:
      False within modules whose name begins with `task_`.

    Example:
      >>> is_shared("params/experts/kernel_0"), is_shared("params/task_gates/kernel")
      (True, False)
    """
    return not any(part.startswith("task_") for part in path.split("/"))
