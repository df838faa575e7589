"""One cell of mlp_step.py in a torchjd environment: the same model and arguments."""

import json
import sys
import time
from pathlib import Path

import torch
import torchjd.aggregation
from torchjd.autojac import jac_to_grad, mtl_backward


def resident_mb(field: str) -> float:
    """Resident memory of this process in 1e6 bytes: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    """Times the step of one aggregator."""
    name, (tasks, batch, width, inputs, steps) = sys.argv[1], map(int, sys.argv[2:])
    torch.manual_seed(0)
    relu, linear = torch.nn.ReLU(), torch.nn.Linear
    trunk = torch.nn.Sequential(
        linear(inputs, width),
        relu,
        linear(width, width),
        relu,
        linear(width, width),
        relu,
    )
    heads = torch.nn.ModuleList([linear(width, 1, bias=False) for _ in range(tasks)])
    parameters = [*trunk.parameters(), *heads.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    x, y = torch.randn(batch, inputs), torch.randn(tasks, batch, 1)
    if name == "NashMTL":
        aggregator = torchjd.aggregation.NashMTL(n_tasks=tasks)
    elif name == "CAGrad":
        aggregator = torchjd.aggregation.CAGrad(c=0.5)
    elif name != "sum":
        aggregator = getattr(torchjd.aggregation, name)()

    def step() -> None:
        features = trunk(x)
        losses = [((head(features) - t) ** 2).mean() for head, t in zip(heads, y)]
        optimizer.zero_grad()
        if name == "sum":
            sum(losses).backward()
        else:
            mtl_backward(losses, features=features)
            jac_to_grad(trunk.parameters(), aggregator)
        optimizer.step()

    for _ in range(3):
        step()
    idle = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    milliseconds = 1e3 * sorted(times)[len(times) // 2]
    peak = resident_mb("VmHWM") - idle
    print(json.dumps({"ms": milliseconds, "peak_mb": peak}))


if __name__ == "__main__":
    main()
