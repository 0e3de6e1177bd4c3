"""The documents: links lead somewhere, files, modules and identifiers that are named exist."""

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md") if not {".venv", "runs", ".git"} & set(path.relative_to(ROOT).parts)
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(
    r"(?:longrl|tests|configs|bench|docs|examples|launch|longvideo-reason|requirements)"
    r"/[\w./-]*\w\.(?:py|ya?ml|md|sh|lock|txt|sbatch)"
)
MODULE = re.compile(r"\blongrl(?:\.[A-Za-z_]\w*)+")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ +(.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document):
    broken = []
    for target in LINK.findall(document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue  # of the web: not reachable from a test
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_files_that_are_named_exist(document):
    if document.name == "CHANGELOG.md":
        return  # it names what has gone
    named = {file for code in CODE.findall(document.read_text()) for file in FILE.findall(code)}
    assert sorted(file for file in named if "NAME" not in file and not (ROOT / file).exists()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_tests_that_are_named_exist(document):
    if document.name == "CHANGELOG.md":
        return
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", document.read_text())
    assert [(file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_modules_that_are_named_exist(document):
    if document.name == "CHANGELOG.md":
        return
    named = {module for code in CODE.findall(document.read_text()) for module in MODULE.findall(code)}
    assert sorted(module for module in named if not exists(module)) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_lists_and_tables_stand_behind_an_empty_line(document):
    """The site's Markdown takes them for text otherwise, and a list in a list if it is indented by less than 4."""
    prose = re.sub(r"^ *(```+|~~~+).*?^ *\1 *$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    behind_text = re.findall(r"^(?![-*#|<> ]|\d+\. ).+\n(?=[-*] |\d+\. |\|)", prose, re.MULTILINE)
    nested = re.findall(r"^ {1,3}(?:[-*]|\d+\.) .*", prose, re.MULTILINE)
    assert behind_text + nested == []


def test_the_nav_of_the_site_names_every_page():
    nav = set(re.findall(r"^ +- (?:[^:\n]+: )?([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages - nav) == []


def test_the_index_of_decisions_names_every_decision():
    folder = ROOT / "docs" / "decisions"
    listed = LINK.findall((folder / "index.md").read_text())
    assert sorted(listed) == sorted(path.name for path in folder.glob("*.md") if path.name != "index.md")


IDENTIFIER = re.compile(r"(?<![\w.])[A-Za-z_]\w{3,}")
OF_OTHERS = {
    "CUDA_VISIBLE_DEVICES", "MODEL_SEQ_LEN", "SPLIT_THINK", "accelerate", "autoload", "bashcompinit", "cu_seqlens",
    "data_parallel_size", "extract_mcq_answer", "frame_num", "gen_kwargs", "generation_kwargs", "max_frames_num",
    "mm_embeds", "post_prompt", "pre_prompt", "process_results", "reasoning_tags",
}  # fmt: skip
"""Names that documents compare with ours."""


@cache
def known_words() -> set[str]:
    """Every word of code, configs and scripts, and of the names of files."""
    words = set()
    folders = "longrl tests bench launch configs requirements longvideo-reason .github docs examples"
    for folder in folders.split():
        for file in (ROOT / folder).rglob("*"):
            words.update(re.findall(r"\w+", str(file.relative_to(ROOT))))
            if file.suffix in (".py", ".yaml", ".yml", ".jinja", ".sh", ".sbatch", ".txt") and file != Path(__file__):
                words.update(re.findall(r"\w+", file.read_text()))
    for file in ("pyproject.toml", "Makefile", "mkdocs.yml"):
        words.update(re.findall(r"\w+", (ROOT / file).read_text()))
    return words


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_identifiers_that_are_named_exist(document):
    if document.name == "CHANGELOG.md":
        return
    named = {word for code in CODE.findall(document.read_text()) for word in IDENTIFIER.findall(code)}
    unknown = {word for word in named - known_words() - OF_OTHERS if not word.startswith("my_")}
    # `_tokens` stands for all names that end so.
    endings = {word for word in unknown if word[0] == "_" and any(known.endswith(word) for known in known_words())}
    assert sorted(unknown - endings) == []


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        if found is not None:
            rest = parts[count:]
            return not rest or hasattr(importlib.import_module(module), rest[0])
    return False
