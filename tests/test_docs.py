"""The documentation is true: its blocks run, its links lead somewhere, its site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from docs_pages import LANGUAGES, PAGES, ROOT, RUN, Block, Page
from docs_project import NAMES, make_project, names_for
from typer.testing import CliRunner

import fastfi
import fastfi.data
from fastfi.cli._app import app

pytestmark = pytest.mark.usefixtures("one_thread")

_PAGES = [Page(path) for path in PAGES]
_BLOCKS = [(page, block) for page in _PAGES for block in page.blocks()]
_IDLE = [(page, block) for page, block in _BLOCKS if block.reason is not None]
# Every page whose links must hold.
_LINKED = [*_PAGES, *(Page(ROOT / p) for p in ("CONTRIBUTING.md", "CHANGELOG.md"))]
_LINKED += [Page(path) for path in sorted((ROOT / "examples").glob("*.md"))]
NOT_RUN = 9  # how many blocks there are that say why they are not run


def _id(value: Any) -> str:
    return value.name if isinstance(value, Page) else f"line {value.line}"


def _commands(text: str) -> list[list[str]]:
    """The commands of a shell block, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _run_shell(block: Block, where: str) -> None:
    for words in _commands(block.text):
        if words[0] == "fastfi":
            result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
            assert result.exit_code == 0, f"{where}: {shlex.join(words)}\n{result.output}"
        elif words[:3] == ["python", "-m", "fastfi.doctor"]:
            done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
            assert "fastfi" in done.stdout, f"{where}: {done.stdout}{done.stderr}"
        else:
            pytest.fail(f"{where}: cannot run {words[0]!r}; say why: <!-- not run: ... -->")


@pytest.mark.parametrize(
    "page", [p for p in _PAGES if any(b.language in RUN for b in p.blocks())], ids=_id
)
def test_the_blocks_of_a_page_run(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())  # commands put the folder there
    namespace = {"__name__": "__main__", **names_for(page.names(), tmp_path)}
    ran = 0
    for block in page.blocks():
        if block.language not in RUN or block.reason is not None:
            continue
        ran += 1
        if block.language == "bash":
            _run_shell(block, f"{page.name}:{block.line}")
        else:
            code = "\n" * (block.line - 1) + block.text  # errors name the page's lines
            exec(compile(code, str(page.path), "exec"), namespace)
    assert ran > 0 or all(b.reason for b in page.blocks() if b.language in RUN)
    for name in [n for n in sys.modules if n.split(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.mark.parametrize(("page", "block"), _IDLE, ids=_id)
def test_blocks_that_are_not_run_say_why(page: Page, block: Block) -> None:
    assert block.language in RUN
    if block.language == "python":
        compile(block.text, page.name, "exec")
    pytest.skip(f"{page.name}:{block.line} is not run: {block.reason}")


def test_the_number_of_blocks_that_are_not_run_is_known() -> None:
    listed = "\n".join(f"{page.name}:{b.line}: {b.reason}" for page, b in _IDLE)
    assert len(_IDLE) == NOT_RUN, f"these blocks are not run:\n{listed}"
    assert sum(b.language in RUN for _, b in _BLOCKS) >= 30 + NOT_RUN


@pytest.mark.parametrize("page", _PAGES, ids=_id)
def test_blocks_are_of_languages_that_are_run(page: Page) -> None:
    for block in page.blocks():
        where = f"{page.name}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: language {block.language!r}"
        if block.language == "text":
            found = re.search(r"^(>>> |\$ |import |from |fastfi |python |pip )", block.text, re.M)
            assert found is None, f"{where}: code as text: {found}"
    unknown = set(page.names()) - set(NAMES)
    assert not unknown, f"{page.name}: no such names: {unknown}"


def test_a_comment_is_about_the_next_block_only(tmp_path: Path) -> None:
    text = (
        "<!-- not run: reason -->\n```bash\na\n```\n\n```bash\nb\n```\n\n    indented\n\n```\n```\n"
    )
    text += "<!-- not run: lost -->\n\nA paragraph.\n\n```rust\n```\n"
    path = tmp_path / "page.md"
    path.write_text(text)
    blocks = [(b.line, b.language, b.text, b.reason) for b in Page(path).blocks()]
    assert blocks == [
        (3, "bash", "a\n", "reason"),
        (7, "bash", "b\n", None),
        (10, "", "indented\n", None),
        (13, "", "", None),
        (19, "rust", "", None),
    ]


@pytest.mark.parametrize("page", _LINKED, ids=_id)
def test_links_lead_somewhere(page: Page) -> None:
    for link in page.links():
        where = f"{page.name}:{link.line}: {link.target}"
        parts = urlsplit(link.target)
        if parts.scheme:
            assert parts.scheme == "https" and parts.netloc, where
            continue
        target = (page.path.parent / parts.path).resolve() if parts.path else page.path
        assert target.is_file() and target.is_relative_to(ROOT), where
        if parts.fragment:
            assert target.suffix == ".md", where
            assert parts.fragment in Page(target).anchors(), where


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(p.read_text() for p in (ROOT / "docs" / "api").glob("*.md"))
    entries = set(re.findall(r"^::: (\S+)", text, re.M)) | set(
        re.findall(r"^ +heading: (\S+)", text, re.M)
    )
    modules = ("attack", "baselines", "layers", "plot", "data", "sklearn", "ray", "report")
    names = {f"fastfi.{n}" for n in fastfi.__all__ if n not in (*modules, "__version__")}
    for module in (fastfi.attack, fastfi.baselines, fastfi.layers, fastfi.plot):
        names |= {f"{module.__name__}.{n}" for n in module.__all__}
    names |= {"fastfi.data.open_dataset", "fastfi.sklearn.InfluenceOutlierDetector"}
    assert names <= entries, f"missing: {sorted(names - entries)}"


def _of_the_site(name: str) -> Any:
    """A module of docs/tools."""
    path = ROOT / "docs" / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_is_on_its_page() -> None:
    options = _of_the_site("command_options")
    text = (ROOT / "docs" / "command_line.md").read_text()
    found = re.findall(r"<!-- options of (.+?) -->", text)
    assert sorted(found) == sorted(options.commands())
    score = options.option_table(options.commands()["score"])
    assert "--inverse" in score and "--wrt" in score and "\\|" in score


@pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("mkdocs", "material", "mkdocstrings")),
    reason='the site needs pip install "fastfi[docs]"',
)
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    loaded = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""")
    for page in pages:
        found = loaded.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{page}: {found and found[0]}"
    reference = (tmp_path / "site" / "api" / "influence.html").read_text(encoding="utf-8")
    assert 'id="fastfi.influence_map"' in reference
    assert ":func:" not in reference and ":class:" not in reference
