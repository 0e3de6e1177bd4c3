"""A hook of mkdocs.yml: pages that the site has beside docs/, and links that work in a checkout as in the site.

Documents outside docs/ become pages, each file that a document links to becomes a page that shows it, and each package
of longrl gets a page of the API reference, filled from docstrings by mkdocstrings. A link names a file by its path in
the repository, as every Markdown viewer reads it; while the page is built it is turned into the path within the site.
"""

import ast
import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    "README.md": "readme.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "bench.md",
    "launch/README.md": "launch.md",
    "longvideo-reason/README.md": "longvideo_reason.md",
    "configs/shapes/README.md": "shapes.md",
}
"""Pages from outside docs/: path in the repository -> page of the site."""
CODE = re.compile(r"(^ *(?P<fence>```+|~~~+).*?^ *(?P=fence) *$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(?<=\]\()([^)\s]+)(?=\))|(?<=src=")([^"]+)(?=")|(?<=href=")([^"]+)(?=")')
SPAN = re.compile(r"(?<!</span>)(?<!<pre>)<code>([^<\n]+)</code>")
LONG_WORD = 24
BREAK = re.compile(r"(?<=\w)[./_](?=\w)(?!(?:py|ya?ml|md|sh|sbatch|lock|toml|jsonl?|csv|html|txt)\b)")
"""Code spans with longer words may break within them, or tables would be wider than the page."""
MEDIA = (".svg", ".png", ".webp", ".gif", ".jpg")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".sbatch": "bash", ".toml": "toml"}
API_HEAD = """\
# API reference

All public modules, from their docstrings: a page for each package; the [architecture](../architecture.md) has the map.
Begin with the names below, which you import as `from longrl import HFEngine`: they are the public API (`longrl.__all__`).
The pages about [extending longrl](../extend/index.md) show how to use them.
"""
API_OPTIONS = """\
    options:
      heading_level: 2
      show_root_full_path: true
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the packages of longrl under the nav's "API"."""
    for section in config.nav or []:
        for entries in section.values():
            if "API" in entries:
                pages = [{name: f"api/{name}.md"} for name in api_modules()]
                entries[entries.index("API")] = {"API": ["api/index.md", *pages]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what docs/ does not have: documents, files that are linked to, examples, the API."""
    for path, uri in DOCUMENTS.items():
        add(files, config, uri, (ROOT / path).read_text())
    add(files, config, "examples.md", examples_page())
    add(files, config, "api/index.md", api_index())
    for name, modules in api_modules().items():
        add(files, config, f"api/{name}.md", api_page(name, modules))
    waiting = [(repository_path(file.src_uri), file.content_string) for file in files.documentation_pages()]
    while waiting:
        path, text = waiting.pop()
        for target in linked_files(path, text):
            uri = site_path(target)
            if files.get_file_from_path(uri) is None:
                content = file_page(target)
                add(files, config, uri, content)
                if isinstance(content, str):
                    waiting.append((repository_path(uri), content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text with links that lead to pages of the site."""
    path = repository_path(page.file.src_uri)

    def site_link(match: re.Match) -> str:
        target = linked_path(path, match.group())
        if target is None:
            return match.group()
        anchor = match.group().partition("#")[1:]
        return posixpath.relpath(site_path(target), posixpath.dirname(page.file.src_uri) or ".") + "".join(anchor)

    return "".join(part if is_code else LINK.sub(site_link, part) for part, is_code in split_code(markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with spans of code that break within long names, and not behind the dashes of an option."""
    return SPAN.sub(lambda match: f"<code>{' '.join(map(breakable, match.group(1).split(' ')))}</code>", html)


def breakable(word: str) -> str:
    """A word of code as HTML: `--model.optimizer.lr` may break behind its dots."""
    option = re.match(r"--?\w+", word)
    head = f'<span class="option">{option.group()}</span>' if option else ""
    rest = word[option.end() if option else 0 :]
    return head + (BREAK.sub(r"\g<0><wbr>", rest) if len(word) > LONG_WORD else rest)


def add(files: Files, config: MkDocsConfig, uri: str, content: str | bytes) -> None:
    """Puts a generated file into the site."""
    files.append(File.generated(config, uri, content=content))


# Paths


def repository_path(uri: str) -> str:
    """Where a page of the site comes from: `asynchronous.md` -> `docs/asynchronous.md`."""
    if uri.startswith("files/"):
        return uri.removeprefix("files/").removesuffix(".md")
    of_documents = {page: path for path, page in DOCUMENTS.items()}
    return of_documents.get(uri, "examples/README.md" if uri == "examples.md" else f"docs/{uri}")


def site_path(path: str) -> str:
    """Where the site has a file of the repository: `configs/demo/sft.yaml` -> `files/configs/demo/sft.yaml.md`."""
    if path in DOCUMENTS:
        return DOCUMENTS[path]
    if path == "examples":
        return "examples.md"
    if path.startswith("docs/") and path.endswith((".md", *MEDIA)):
        return path.removeprefix("docs/")
    if path == "docs" or (path.startswith("docs/") and (ROOT / path / "index.md").exists()):
        return posixpath.join(path.removeprefix("docs").lstrip("/"), "index.md")
    return f"files/{path}" if path.endswith(MEDIA) else f"files/{path}.md"


def linked_path(path: str, link: str) -> str | None:
    """The path in the repository that a link of the document `path` names; None for the web, anchors, missing files."""
    link = link.partition("#")[0]
    if not link or re.match(r"[a-z]+:", link):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return target if not target.startswith("..") and (ROOT / target).exists() else None


def linked_files(path: str, text: str) -> set[str]:
    """All that a document links to, as paths in the repository."""
    links = [match.group() for part, is_code in split_code(text) if not is_code for match in LINK.finditer(part)]
    return {target for link in links if (target := linked_path(path, link))}


def split_code(markdown: str) -> list[tuple[str, bool]]:
    """The text cut into parts, and whether each is code (a fenced block or a span)."""
    parts, end = [], 0
    for match in CODE.finditer(markdown):
        parts += [(markdown[end : match.start()], False), (match.group(), True)]
        end = match.end()
    return [*parts, (markdown[end:], False)]


# Pages


def file_page(path: str) -> str | bytes:
    """A page that shows a file or lists a folder; of a picture its bytes."""
    file = ROOT / path
    if path.endswith(MEDIA):
        return file.read_bytes()
    if file.is_dir():
        names = sorted(one.name for one in file.iterdir() if one.is_file() and not one.name.startswith("."))
        return f"# {path}\n\n" + "".join(f"- [{name}]({posixpath.basename(path)}/{name})\n" for name in names)
    if path.endswith(".md"):
        return file.read_text()
    if path.endswith(".ipynb"):
        cells = json.loads(file.read_text())["cells"]
        texts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
        return "\n\n".join(fenced(text, "python") if is_code else text for text, is_code in texts)
    return f"# {path}\n\n{fenced(file.read_text(), LANGUAGES.get(file.suffix, 'text'))}"


def fenced(text: str, language: str) -> str:
    """Text as a block of code, whatever fences it has itself."""
    fence = "`" * 6
    return f"{fence}{language}\n{text}\n{fence}\n"


def examples_page() -> str:
    """The list of examples, each with the first sentence of what it says of itself."""
    entries = [entry for entry in sorted((ROOT / "examples").glob("*")) if not entry.name.startswith(("_", "."))]
    lines = [f"| [`{entry.name}`]({entry.name}) | {first_sentence(entry)} |" for entry in entries]
    head = "# Examples\n\nFiles in `examples/`. CI runs each of them; the head of a file says how you run it.\n"
    return "\n".join([head, "| file | what it shows |", "|---|---|", *lines, ""])


def first_sentence(example: Path) -> str:
    """What an example says in its first sentence: docstring, comment, or that of a folder's README or first file."""
    if example.is_dir():
        inside = [example / "README.md", *sorted(example.glob("*.py")), *sorted(example.glob("*.sh"))]
        return next((first_sentence(file) for file in inside if file.exists()), "")
    if example.suffix == ".py":
        text = ast.get_docstring(ast.parse(example.read_text())) or ""
    elif example.suffix == ".md":
        text = re.sub(r"^#.*\n+", "", example.read_text())
    elif example.suffix == ".ipynb":
        title = json.loads(example.read_text())["cells"][0]["source"][0].strip("# \n")
        text = f"{title}: a notebook."
    else:
        text = "\n".join(re.findall(r"^# (.*)", example.read_text(), re.MULTILINE))
    return re.split(r"(?<=\.)\s|\n\n", text, maxsplit=1)[0].replace("\n", " ").rstrip(":")


def api_modules() -> dict[str, list[str]]:
    """The packages of longrl -> their public modules, by dotted name; `longrl` has the modules beside the packages."""
    modules: dict[str, list[str]] = {}
    for file in sorted((ROOT / "longrl").rglob("*.py")):
        path = file.relative_to(ROOT).with_suffix("")
        in_package = (file.parent / "__init__.py").exists()  # else a file that a command copies
        if path.name.startswith("_") or not in_package or not ast.get_docstring(ast.parse(file.read_text())):
            continue
        package = path.parts[1] if len(path.parts) > 2 else "longrl"
        modules.setdefault(package, []).append(".".join(path.parts))
    return modules


def api_index() -> str:
    """The page before the packages: the names that `import longrl` has, and the page that describes each."""
    (homes,) = re.findall(r"^_HOME = (\{.*?^\})", (ROOT / "longrl/__init__.py").read_text(), re.MULTILINE | re.DOTALL)
    rows = []
    for name, module in ast.literal_eval(homes).items():
        package = module.partition(".")[0]
        page = package if package in api_modules() else "longrl"
        rows.append(f"| `{name}` | [`longrl.{module}`]({page}.md) |")
    return "\n".join([API_HEAD, "| name | module |", "|---|---|", *rows, ""])


def api_page(name: str, modules: list[str]) -> str:
    """The API reference of one package: a directive of mkdocstrings for each module."""
    title = "longrl" if name == "longrl" else f"longrl.{name}"
    return f"# {title}\n\n" + "".join(f"::: {module}\n{API_OPTIONS}\n" for module in modules)
