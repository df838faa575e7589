"""What a study compares."""

from dataclasses import dataclass
from pathlib import Path

from mtjax.study.methods import check_methods


@dataclass(frozen=True)
class Config:
    """A comparison of methods on one problem.

    Attributes:
      data: problem, as `mtjax list` names them; "multi_mnist" ships with mtjax.
      data_dir: folder of prepared data (`mtjax data prepare`); needed for all others.
      methods: balancers, as `mtjax list` names them; "equal" is the plain sum.
      single_task: also train one model per task, the baseline of Δm.
      seeds: number of seeds, at least 1.
      steps: training steps of each run.
      batch_size: examples per step.
      learning_rate: of Adam, or what a method has in its place; the same for all.
      eval_every: steps between evaluations; a tenth of the steps if not given.
      save_every: steps between checkpoints; none if not given. Finished runs are kept
        in any case, and a second start goes on behind them.
      examples: use only so many training examples; all if not given.
    """

    data: str = "multi_mnist"
    data_dir: Path | None = None
    methods: tuple[str, ...] = (
        "equal",
        "uw",
        "famo",
        "pcgrad",
        "mgda",
        "cagrad",
        "nash_mtl",
        "upgrad",
    )
    single_task: bool = True
    seeds: int = 3
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 2e-3
    eval_every: int | None = None
    save_every: int | None = None
    examples: int | None = None

    def __post_init__(self):
        """Checks ranges and names."""
        check_methods(self.methods)
        for name in ("seeds", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}."
                )
        for name in ("eval_every", "save_every", "examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not self.learning_rate > 0:
            raise ValueError(
                f"`learning_rate` must be positive, got {self.learning_rate}."
            )

    @property
    def evaluation_period(self) -> int:
        """Steps between evaluations."""
        return self.eval_every or max(1, self.steps // 10)
