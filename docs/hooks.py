"""What the site needs beyond `mkdocs.yml`.

MkDocs loads this file as a hook: it writes the API pages from the `__all__` of every
package, shows the notebooks as pages, and fills the navigation. Griffe, which reads the
docstrings, loads it as an extension that translates reStructuredText to Markdown.
"""

import ast
import base64
import fnmatch
import json
import re
from functools import lru_cache
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGE = "mtjax"


# --- API pages ------------------------------------------------------------------------


def packages() -> list[str]:
    """Names of the packages that declare public names, the whole library first."""
    inits = sorted((ROOT / PACKAGE).rglob("__init__.py"))
    names = [".".join(init.parent.relative_to(ROOT).parts) for init in inits]
    return [name for name in names if public_names(name)]


def public_names(package: str) -> list[str]:
    """The `__all__` of a package, or what it imports `as` the same name."""
    imported = []
    for node in _parse(package).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
        if isinstance(node, ast.ImportFrom):
            imported += [a.name for a in node.names if a.asname == a.name]
    return imported


def home(module: str, name: str) -> tuple[str, str]:
    """Follows imports from package to package to where a name is defined."""
    for node in _parse(module).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return home(str(node.module), alias.name)
    return module, name


def documented_in(name: str, target: str) -> str | None:
    """The package on whose page an object stands: the first of those that export it."""
    for package in packages()[1:]:
        if name in public_names(package) and ".".join(home(package, name)) == target:
            return package
    return None


def summary(module: str, name: str) -> str:
    """First line of a docstring; that of a constant stands after it."""
    body = _parse(module).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if getattr(node, "name", None) == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
        if (
            isinstance(node, ast.Assign | ast.AnnAssign)
            and name in ast.unparse(node).partition("=")[0]
            and isinstance(after, ast.Expr)
        ):
            return str(ast.literal_eval(after.value)).partition("\n")[0]
    return ""


def api_page(package: str) -> str:
    """The page of a package: a table of its public names, then each of them."""
    docstring = ast.get_docstring(_parse(package)) or ""
    lines = [f"# {package}", "", to_markdown(docstring), "", "| name | |", "|---|---|"]
    bodies = []
    for name in sorted(public_names(package), key=str.lower):
        module, original = home(package, name)
        target = f"{module}.{original}"
        text = to_markdown(summary(module, original)).replace("|", r"\|")
        lines.append(f"| [`{name}`][{target}] | {text} |")
        if package == documented_in(name, target):
            bodies += ["", f"::: {target}"]
    return "\n".join(lines + bodies) + "\n"


def _parse(module: str) -> ast.Module:
    path = ROOT / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return _parse_file(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1000)
def _parse_file(path: Path, _modified: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# --- Notebooks ------------------------------------------------------------------------


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the images that the page shows."""
    parts, images = [], {}
    for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                name = f"{path.stem}_{number}.png"
                images[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Output of the cell above]({name})")
            else:
                parts.append(f"```output\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", images


# --- MkDocs events --------------------------------------------------------------------


def on_files(files, config):
    """Adds the written pages and fills the navigation."""

    def add(uri, content):
        files.append(File.generated(config, uri, content=content))

    for package in packages():
        page = "index" if package == PACKAGE else package.removeprefix(f"{PACKAGE}.")
        add(f"api/{page}.md", api_page(package))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, images = notebook_page(path)
        add(f"notebooks/{path.stem}.md", text)
        for name, content in images.items():
            add(f"notebooks/{name}", content)
    named = {uri for uri in _leaves(config.nav) if "*" not in uri}
    pages = [file.src_uri for file in files.documentation_pages()]
    # An index page comes first: it opens its section.
    pages.sort(key=lambda uri: (not uri.endswith("index.md"), uri))
    config.nav = _expanded(config.nav, [uri for uri in pages if uri not in named])
    return files


def on_page_markdown(markdown, **_):
    """Links the names of the library in the text of every page."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("```") else link_names(part) for part in parts
    )


def _leaves(nav):
    for item in nav:
        for value in item.values() if isinstance(item, dict) else [item]:
            yield from _leaves(value) if isinstance(value, list) else [value]


def _expanded(nav, pages: list[str]) -> list:
    def matches(pattern):
        depth = pattern.count("/")
        return [
            uri
            for uri in pages
            if fnmatch.fnmatch(uri, pattern) and uri.count("/") == depth
        ]

    result = []
    for item in nav:
        if isinstance(item, str):
            result += matches(item) if "*" in item else [item]
            continue
        ((title, value),) = item.items()
        if isinstance(value, list):
            value = _expanded(value, pages)
        elif "*" in value:
            value = matches(value)
        if value:
            result.append({title: value})
    return result


# --- Docstrings -----------------------------------------------------------------------


def to_markdown(text: str, package: str = "") -> str:
    """Translates the reStructuredText roles of a docstring to Markdown."""
    text = re.sub(r":math:`([^`]+)`", r"\\(\1\\)", text)
    text = re.sub(
        r"^( *)\.\. math::\n((?:\1 +.*\n?|\s*\n)+)",
        lambda m: f"{m[1]}\\[{' '.join(m[2].split())}\\]\n\n",
        text,
        flags=re.MULTILINE,
    )
    text = re.sub(r":(?:func|class|mod|meth|data):`~?([^`]+)`", r"`\1`", text)
    # Griffe knows "Examples:" as code; "Example:" would be a box of plain text.
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return link_names(text, package)


def link_names(text: str, package: str = "") -> str:
    """Turns `mtjax.pcgrad` into a link, and `pcgrad` in docstrings of its package."""

    def link(match: re.Match) -> str:
        module, _, name = match[1].rpartition(".")
        if name not in _EXPORTS.get(module or package, ()):
            return match[0]
        return f"[`{match[1]}`][{'.'.join(home(module or package, name))}]"

    return re.sub(r"(?<![\[`])`([A-Za-z_][\w.]*)`(?![\]`])", link, text)


_EXPORTS = {package: set(public_names(package)) for package in packages()}


class Docstrings(griffe.Extension):
    """Translates every docstring before Griffe parses it."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Is called once for each object that Griffe has read."""
        if obj.docstring is not None:
            package = obj.module.path.rpartition(".")[0]
            obj.docstring.value = to_markdown(obj.docstring.value, package)
