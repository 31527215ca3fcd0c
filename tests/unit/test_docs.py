"""What comments and pages lead to is there: cited headings, linked files and anchors, named paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ofa_ds.model.config import PRESETS, VOCAB_SIZE

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "ofa_ds/docs"
OFA = DOCS / "ofa.md"
DOWNSTREAM = DOCS / "downstream.md"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(DOCS.glob("*.md")),
    ROOT / "kernels/README.md",
    ROOT / "ds_configs/README.md",
]

CITATION = re.compile(r"docs/(ofa|downstream)\.md, ")
FOREIGN_CITATION = re.compile(r"\bspec(ification)?s? \(?0?[0-9]\b|\bspec/|`spec`", re.IGNORECASE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:ofa_ds|tests|launchers|kernels|ds_configs)/[\w./*-]*)`")


def sources() -> Iterator[Path]:
    """Every text file of the repository that a person wrote, but this one, which has wrong citations to find."""
    own, folders = Path(__file__), ("ofa_ds", "kernels", "tests", "launchers", "ds_configs")
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*.*"))]
    kinds = {".py", ".md", ".toml", ".sh", ".env", ".json", ".txt", ".svg", ".example"}
    return (file for file in sorted(files) if file.suffix in kinds and "golden" not in file.parts and file != own)


def headings(page: str) -> list[str]:
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    return re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)


def anchor(heading: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def citable() -> set[str]:
    """Headings of ofa.md and downstream.md, and the parts that they are of: `Model: positions`, `Model`."""
    found = [heading for page in (OFA, DOWNSTREAM) for heading in headings(page.read_text(encoding="utf-8"))[1:]]
    return {*found, *(heading.partition(":")[0] for heading in found)}


def wrong_citations(text: str, known: set[str]) -> list[str]:
    """What follows the name of one of these pages and is no heading; it may run on in the next line of a comment."""
    text = re.sub(r"\s*\n\s*(#\s*)?", " ", text)
    names = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    found = (text[match.end() : match.end() + 60] for match in CITATION.finditer(text))
    return [after for after in found if not re.match(rf"({names})(?![\w:]|: )", after)]


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, fragment = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            broken.append(target)
        elif fragment and fragment not in map(anchor, headings(text if not name else file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def test_every_citation_of_ofa_md_names_a_heading() -> None:
    known = citable()
    wrong = {str(file): wrong_citations(file.read_text(encoding="utf-8"), known) for file in sources()}
    assert {file: found for file, found in wrong.items() if found} == {}
    cited = sum(len(CITATION.findall(file.read_text(encoding="utf-8"))) for file in sources())
    assert cited > 30


def test_nothing_cites_a_specification_that_is_not_here() -> None:
    texts = {str(file): file.read_text(encoding="utf-8") for file in sources()}
    assert [file for file, text in texts.items() if FOREIGN_CITATION.search(text)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_paths_that_a_page_names_are_there(page: Path) -> None:
    missing = [path for path in PATH.findall(page.read_text(encoding="utf-8")) if not list(ROOT.glob(path))]
    assert missing == []


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    linked = {(ROOT / target).resolve() for target in LINK.findall(text) if not target.startswith("http")}
    assert {page for page in PAGES if page.name != "README.md"} <= linked
    assert all(len(page.read_text(encoding="utf-8").splitlines()) <= 500 for page in PAGES)


def test_the_sizes_of_ofa_md_are_the_presets() -> None:
    text = OFA.read_text(encoding="utf-8")
    table = text.partition("## Model: sizes\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    rows = {name: cells for name, *cells in lines}
    names = ["tiny", "medium", "base", "large", "huge", "6b"]
    models = [PRESETS[name] for name in names]
    assert rows["D"] == [str(model.dim) for model in models]
    assert rows["feed-forward width"] == [str(model.ffn_dim) for model in models]
    assert rows["encoder + decoder layers"] == [f"{model.encoder_layers} + {model.decoder_layers}" for model in models]
    assert rows["heads (d)"] == [f"{model.num_heads} ({model.head_dim})" for model in models]
    assert rows["parameters, English"][0] == "33 488 336" and f"| V | | {VOCAB_SIZE:,} |".replace(",", " ") in text


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("docs/ofa.md, Model: positions", 0),
        ("see (docs/ofa.md,\n    # Model:\n# positions) for", 0),
        ("docs/ofa.md, Model.", 0),
        ("docs/ofa.md, Model: poses", 1),
        ("docs/ofa.md, Model: positionsx", 1),
        ("docs/ofa.md, section 4", 1),
    ],
)
def test_a_wrong_citation_is_found(text: str, wrong: int) -> None:
    assert len(wrong_citations(text.replace("docs/ofa.md,\n    # ", "docs/ofa.md, "), citable())) == wrong


@pytest.mark.parametrize("text", ["spec 01 section 4", "(spec 05, 2.8)", "the `spec` parity", "Spec 3"])
def test_a_citation_of_something_else_is_found(text: str) -> None:
    assert FOREIGN_CITATION.search(text)


@pytest.mark.parametrize(
    "target, wrong",
    [("ofa.md#model-6b", 0), ("ofa.md#model-7b", 1), ("nowhere.md", 1), ("#data", 0), ("#date", 1), ("https://a/b", 0)],
)
def test_a_broken_link_is_found(target: str, wrong: int) -> None:
    assert len(broken_links(DOCS / "data.md", f"# Data\n[a]({target})\n")) == wrong
