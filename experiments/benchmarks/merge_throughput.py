"""Merging large checkpoints on disk, beside mergekit and beside a plain copy.

Synthetic fine-tunings in bfloat16, in the layout of Hugging Face (several files, an
index, a Llama configuration), are merged by the commands of both libraries, each in a
process of its own, in turns. "copy" reads the same bytes and writes as many as a merge
does, with the same calls and nothing in between. Peak memory is that of the process.
mergekit's TIES takes thresholds per tensor, and so does ours here (`scope: tensor`).

Commands: python experiments/benchmarks/merge_throughput.py full
              --mergekit PEER/bin/mergekit-yaml
          python experiments/benchmarks/merge_throughput.py quick
Peer:     python3 -m venv PEER && PEER/bin/pip install mergekit
Machine:  two CPU cores, 12 GB of disk.
Minutes:  15 (full), 1 (quick).
Expect:   docs/benchmarks.md.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import jax.numpy as jnp
import numpy as np
import tyro
import yaml
from rich.progress import track
from safetensors.numpy import save_file
from turns import print_header, print_row

# Runs a command and says its seconds and its peak memory in kB. A small parent, because
# a process peaks at no less than the one it was forked from.
_WATCH = """
import os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(time.perf_counter() - start, usage.ru_maxrss)
sys.exit(status != 0)
"""
_COPY = """
import sys
*inputs, out = sys.argv[1:]
buffer = bytearray(1 << 23)
with open(out, "wb", buffering=0) as target:
    for i, name in enumerate(inputs):
        with open(name, "rb", buffering=0) as source:
            while count := source.readinto(buffer):
                if i % int({models}) == 0:
                    target.write(memoryview(buffer)[:count])
"""

Method = Literal["linear", "task_arithmetic", "ties", "dare_ties"]  # as in mergekit


@dataclass(frozen=True)
class Config:
    """What is merged, and how often."""

    models: int = 4
    layers: int = 12
    width: int = 1536
    vocabulary: int = 32_000
    methods: tuple[Method, ...] = ("linear", "task_arithmetic", "ties", "dare_ties")
    rounds: int = 3
    mergekit: Path | None = None  # its command, in an environment of its own
    folder: Path | None = None  # where the checkpoints are made; temporary by default


QUICK = Config(models=2, layers=2, width=64, vocabulary=256, rounds=1)


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The parameters of a Llama of this size."""
    width, inner = config.width, 4 * config.width
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (config.vocabulary, width),
    }
    for i in range(config.layers):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            found[f"{layer}.self_attn.{name}_proj.weight"] = (width, width)
        for name, shape in (("gate", (inner, width)), ("up", (inner, width))):
            found[f"{layer}.mlp.{name}_proj.weight"] = shape
        found[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = (width,)
    return found


def make(config: Config, folder: Path) -> list[Path]:
    """Writes a base and its fine-tunings, if they are not there."""
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    names, files = list(shapes(config)), 3
    folders = [folder / name for name in ("base", *map(str, range(config.models)))]
    for seed, path in enumerate(track(folders, "checkpoints")):
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        where = {}
        for part in range(files):
            file = f"model-{part + 1:05}-of-{files:05}.safetensors"
            tree = {
                name: weights(seed, i, shapes(config)[name])
                for i, name in enumerate(names)
                if i % files == part
            }
            save_file(tree, path / file, metadata={"format": "pt"})
            where |= dict.fromkeys(tree, file)
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        (path / "config.json").write_text(json.dumps(settings))
    return folders


def weights(seed: int, i: int, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of the base, which all share, with a small change of each model's own."""
    values = np.random.default_rng(i).standard_normal(shape, np.float32) * 0.02
    if seed:
        own = np.random.default_rng((seed, i)).standard_normal(shape, np.float32)
        values += own * 0.001
    return values.astype(jnp.bfloat16)


def recipes(method: str, folders: list[Path], out: Path) -> tuple[dict, dict]:
    """The same merge in our words and in mergekit's."""
    base, *models = map(str, folders)
    ours = {"base": base, "models": models, "out": str(out), "dtype": "bfloat16"}
    steps = {
        "linear": [{"average": {}}],
        "task_arithmetic": [{"task_arithmetic": {"scale": 0.3}}],
        "ties": [{"ties": {"density": 0.2, "scope": "tensor"}}],
        "dare_ties": [
            {"dare": {"drop_rate": 0.8}},
            {"elect_sign": {"tie": "positive"}},
            {"disjoint_mean": {}},
        ],
    }
    parameters = {"weight": 0.3 if method == "task_arithmetic" else 1.0}
    if method in ("ties", "dare_ties"):
        parameters["density"] = 0.2
    theirs = {
        "merge_method": method,
        "models": [{"model": m, "parameters": parameters} for m in models],
        "dtype": "bfloat16",
        "parameters": {"normalize": method != "task_arithmetic"},
    }
    if method != "linear":
        theirs["base_model"] = base
    else:
        del ours["base"]
    return ours | {"method": steps[method]}, theirs


def measure(command: list[str], out: Path) -> tuple[float, float]:
    """Seconds and peak MB of a command; its output is removed."""
    watched = [sys.executable, "-c", _WATCH, *command]
    done = subprocess.run(watched, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    seconds, kilobytes = map(float, done.stdout.split()[-2:])
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return seconds, kilobytes * 1024 / 1e6


def main(config: Config) -> None:
    """Prints a table."""
    temporary = tempfile.TemporaryDirectory() if config.folder is None else None
    folder = Path(temporary.name) if temporary else config.folder
    assert folder is not None
    folders = make(config, folder)
    one = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
    print(f"{config.models} models of {one / 1e9:.2f} GB, {config.rounds} rounds")
    head = ["method", "copy s", "mtjax s", "/ copy", "peak MB"]
    peer = ["mergekit s", "peak MB", "/ mtjax"] if config.mergekit else []
    if not config.mergekit:
        print("mergekit is left out: give its command with --mergekit")
    print_header([*head, *peer])
    for method in config.methods:
        out = folder / "out"
        runs = commands(config, method, folders, out)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(config.rounds):
            for name, command in runs.items():
                found[name].append(measure(command, out))
        seconds = {name: median(s for s, _ in pairs) for name, pairs in found.items()}
        peak = {name: max(mb for _, mb in pairs) for name, pairs in found.items()}
        cells = [method, f"{seconds['copy']:.1f}", f"{seconds['mtjax']:.1f}"]
        cells += [f"{ratio(found, 'mtjax', 'copy'):.2f}", f"{peak['mtjax']:.0f}"]
        if "mergekit" in runs:
            cells += [f"{seconds['mergekit']:.1f}", f"{peak['mergekit']:.0f}"]
            cells += [f"{ratio(found, 'mergekit', 'mtjax'):.2f}"]
        print_row(cells)
    if temporary:
        temporary.cleanup()


def commands(config: Config, method: str, folders: list[Path], out: Path):
    """What is run for one method, by name."""
    ours, theirs = recipes(method, folders, out)
    recipe = out.with_name("recipe.yaml")
    recipe.write_text(yaml.safe_dump(ours))
    inputs = folders if "base" in ours else folders[1:]
    files = [str(f) for path in inputs for f in sorted(path.glob("*.safetensors"))]
    # One file in so many is written too.
    interleaved = sorted(files, key=lambda name: Path(name).name)
    code = _COPY.format(models=len(inputs))
    call = "from mtjax.cli import main; main()"
    runs = {
        "copy": [sys.executable, "-c", code, *interleaved, str(out)],
        "mtjax": [sys.executable, "-c", call, "merge", "--recipe", str(recipe)],
    }
    if config.mergekit:
        other = out.with_name("mergekit.yaml")
        other.write_text(yaml.safe_dump(theirs))
        flags = ["--allow-crimes", "--no-copy-tokenizer", "--lazy-unpickle"]
        runs["mergekit"] = [str(config.mergekit), str(other), str(out), *flags]
    return runs


def ratio(found, first: str, second: str) -> float:
    """Median of the ratios of neighbouring runs."""
    return median(a / b for (a, _), (b, _) in zip(found[first], found[second]))


def quick(config: tyro.conf.OmitArgPrefixes[Config] = QUICK) -> None:
    """Seconds: two tiny models."""
    main(config)


def full(config: tyro.conf.OmitArgPrefixes[Config] = Config()) -> None:
    """The table of the documentation."""
    main(config)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "full": full})
