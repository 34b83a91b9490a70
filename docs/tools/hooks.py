"""What mkdocs does beyond docs/: pages from elsewhere in the repository, and the commands' options.

README.md, CONTRIBUTING.md and the like are pages of the site too, without copies: links between any
of these files are written for GitHub, relative to the file, and rewritten here.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

from command_options import commands, option_table

ROOT = Path(__file__).parents[2]
# Files outside docs/ that are pages, and where they lie in the site.
PAGES = {"README.md": "index.md"}
for _path in ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"):
    PAGES[_path] = _path
for _file in sorted((ROOT / "bench" / "results").glob("*.md")):
    PAGES[f"bench/results/{_file.name}"] = f"results/{_file.name}"
# Reports of the reproduction of Shu and Zhu (2019), with their figures.
_REPORTS = "examples/shu_zhu_2019/results"
for _pattern in ("*/report.md", "*/figures/*.png"):
    for _file in sorted((ROOT / _REPORTS).glob(_pattern)):
        _path = _file.relative_to(ROOT / _REPORTS).as_posix()
        PAGES[f"{_REPORTS}/{_path}"] = f"shu_zhu_2019/{_path}"
_SOURCES = {site: source for source, site in PAGES.items()}

_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_OPTIONS = re.compile(r"<!-- options of (.+?) -->.*", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, site in PAGES.items():
        if not source.endswith(".md"):
            files.append(File.generated(config, site, abs_src_path=str(ROOT / source)))
            continue
        text = (ROOT / source).read_text(encoding="utf-8")
        wide = site.startswith("results/")  # tables, reached from the page on performance
        if wide:
            text = f"---\nhide:\n  - toc\n---\n\n{text}"
        file = File.generated(config, site, content=text)
        if wide:
            file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    site = page.file.src_uri
    source = _SOURCES.get(site, f"docs/{site}")

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        path = PAGES.get(path, path.removeprefix("docs/"))
        return os.path.relpath(path, posixpath.dirname(site) or ".") + anchor

    def options(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise PluginError(f"{source}: no command {match[1]!r}, only {', '.join(known)}")
        return option_table(known[match[1]])

    known = commands()
    return _OPTIONS.sub(options, _LINK.sub(link, markdown))
