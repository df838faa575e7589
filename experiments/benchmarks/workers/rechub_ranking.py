"""A ranker of torch-rechub; the argument is a cell of ranking_throughput.py as JSON."""

import contextlib
import json
import sys

import torch
from ranking_log import FIELDS, NUMBERS, TASKS, drawn
from serve import milliseconds, serve
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch_facts import finished
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import MMOE, PLE
from torch_rechub.trainers import MTLTrainer


class Rows(Dataset):
    """Examples as the library's own data sets give them."""

    def __init__(self, columns, labels):
        """Keeps them."""
        self.columns, self.labels = columns, labels

    def __getitem__(self, i):
        """The values of one example, and its labels."""
        return {name: x[i] for name, x in self.columns.items()}, self.labels[i]

    def __len__(self):
        """Their number."""
        return len(self.labels)


def without_norms(module: nn.Module) -> None:
    """Puts nothing in the place of batch normalisations."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d):
            setattr(module, name, nn.Identity())
        else:
            without_norms(child)


def main() -> None:
    """Makes the ranker, and serves a step and an epoch."""
    cell = json.loads(sys.argv[1])
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    values, numbers, labels = drawn(cell["rows"], cell["vocabulary"])
    names = [f"field_{i:02}" for i in range(FIELDS)]
    dense = [f"number_{i}" for i in range(NUMBERS)]
    sizes = cell["vocabulary"], cell["embedding"]
    features = [
        *(SparseFeature(name, *sizes) for name in names),
        *(DenseFeature(name) for name in dense),
    ]
    kinds = ["classification"] * len(TASKS)
    expert, towers = {"dims": cell["expert"]}, [{"dims": cell["tower"]} for _ in TASKS]
    model = {
        "MMoE": lambda: MMOE(features, kinds, 8, expert, towers),
        "PLE": lambda: PLE(features, kinds, 2, 2, 1, expert, towers),
    }[cell["model"]]()
    without_norms(model)
    params = {"lr": 1e-3}
    trainer = MTLTrainer(model, kinds, optimizer_params=params, device=device)
    columns = dict(zip([*names, *dense], [*values.T.copy(), *numbers.T.copy()]))
    tensor = lambda x: torch.from_numpy(x[: cell["batch"]]).to(device)
    batch = {name: tensor(x) for name, x in columns.items()}
    targets = tensor(labels)

    def one_step():
        predicted = model(batch)
        losses = [
            f(predicted[:, i], targets[:, i]) for i, f in enumerate(trainer.loss_fns)
        ]
        model.zero_grad()
        (sum(losses) / len(losses)).backward()
        trainer.optimizer.step()

    loader = DataLoader(Rows(columns, labels), cell["batch"], shuffle=True)

    def one_epoch():
        quiet = contextlib.redirect_stdout(sys.stderr)
        with quiet:
            trainer.train_one_epoch(loader)

    whats = {"step": finished(one_step), "epoch": finished(one_epoch)}
    for _ in range(2):
        whats["step"]()
    facts = {"parameters": sum(p.numel() for p in model.parameters())}
    timing = cell["seconds"], cell["clock"]
    serve(facts, lambda what: milliseconds(whats[what], *timing))


if __name__ == "__main__":
    main()
