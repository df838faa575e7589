"""Serves the steps of a PyTorch worker."""

from collections.abc import Callable

import torch
from serve import milliseconds, resident_rise_mb, serve
from torch_models import Problem


def finish() -> None:
    """Waits until the device is done, where it runs on its own."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def finished(step: Callable[[], object]) -> Callable[[], None]:
    """The step until the device is done with it."""

    def whole() -> None:
        step()
        finish()

    return whole


def peak_mb(step: Callable[[], object]) -> float:
    """What steps need beyond what is held between them."""
    if not torch.cuda.is_available():
        return resident_rise_mb(step)
    finish()
    idle = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - idle) / 1e6


def serve_step(
    step: Callable[[], object], problem: Problem, cell: dict, route: str = ""
) -> None:
    """Tells size and memory, then times steps on demand."""
    whole = finished(step)
    whole()
    parameters = sum(p.numel() for p in problem.parameters())
    facts = {"parameters": parameters, "peak_mb": peak_mb(whole), "route": route}
    serve(facts, lambda _: milliseconds(whole, cell["seconds"], cell["clock"]))
