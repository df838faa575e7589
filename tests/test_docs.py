"""The site builds without a warning, shows every public name, and its code runs."""

import ast
import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("README.md"),
    *sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("docs/guide/*.md")]),
    *sorted(ROOT.glob("docs/systems/*.md")),
]
# A block of Python and, if one follows at once, the block of what it prints.
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```$(?:\n+```output\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_page(page, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    names = {"__name__": page.stem}
    monkeypatch.chdir(tmp_path)
    # Readers run the code with JAX's defaults, not with those of the tests.
    with jax.numpy_rank_promotion("allow"), np.printoptions():
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start("code"))
            code = compile("\n" * line + block["code"], str(page), "exec")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, names)
            want = block["output"] or ""
            assert doctest.OutputChecker().check_output(
                want, printed.getvalue(), OPTIONS
            ), f"{page.name}:{line + 1} printed\n{printed.getvalue()}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, and what the build said."""
    pytest.importorskip("mkdocstrings", reason="needs `pip install mtjax[docs]`")
    pytest.importorskip("material", reason="needs `pip install mtjax[docs]`")
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    return folder, run


def test_site_builds_without_warnings(site):
    _, run = site
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr


def public_names():
    """What every package exports, read without importing it."""
    found = {}
    for init in sorted(ROOT.glob("mtjax/**/__init__.py")):
        package = ".".join(init.parent.relative_to(ROOT).parts)
        for node in ast.parse(init.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
                found[package] = ast.literal_eval(node.value)
            if isinstance(node, ast.ImportFrom):
                names = [a.name for a in node.names if a.asname == a.name]
                found.setdefault(package, []).extend(names)
    return {package: names for package, names in found.items() if names}


@pytest.mark.parametrize(("package", "names"), public_names().items())
def test_every_public_name_is_documented(site, package, names):
    folder, _ = site
    stem = package.removeprefix("mtjax").removeprefix(".")
    html = (folder / "api" / stem / "index.html").read_text(encoding="utf-8")
    # A row of the table; a build without warnings has no link that leads nowhere.
    links = dict(re.findall(r'href="([^"]+)"><code>(\w+)</code></a>', html))
    assert set(names) <= set(links.values())
    leaves = {link.rpartition(".")[2] for link in links}
    assert set(names) <= leaves


def test_formulas_are_translated(site):
    folder, _ = site
    html = (folder / "api" / "balancing" / "index.html").read_text(encoding="utf-8")
    text = re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)
    assert ":math:" not in text
    assert text.count('class="arithmatex"') > 20


def test_nothing_is_loaded_from_font_servers(site):
    folder, _ = site
    assert "fonts.googleapis.com" not in (folder / "index.html").read_text("utf-8")
