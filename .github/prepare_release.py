# SPDX-License-Identifier: Apache-2.0
"""Makes a checkout ready to be published: checks the version, and writes where it is published.

    python .github/prepare_release.py v0.1.0 https://github.com/OWNER/distorch --notes notes.md

PyPI shows README.md, where links to files of the repository would lead nowhere, and pictures would
be missing. So these become absolute here, and the addresses of the project are written into the
two pyproject.toml. Nothing is written if the version is not the same everywhere.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
NODES_VERSION = re.compile(r'^version = "(.+)"$', re.MULTILINE)
UNPUBLISHED = re.compile(r"(?:not|neither)\s+on\s+PyPI")
# [text](target) and ![text](target); a target with a scheme, or within the page, stays.
LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!#|[a-z]+:)([^)\s]+)(\))")


def main() -> None:
    """Runs as a program. SystemExit says what does not fit."""
    parser = argparse.ArgumentParser(description="Make a checkout ready to be published.")
    parser.add_argument("tag", help="v and the version, such as v0.1.0")
    parser.add_argument("repository", help="its address, such as https://github.com/OWNER/distorch")
    parser.add_argument("--notes", type=Path, help="a file for this version's part of CHANGELOG.md")
    given = parser.parse_args()
    root = Path(__file__).parents[1]
    notes = prepare(root, given.tag, given.repository.rstrip("/"))
    if given.notes is not None:
        given.notes.write_text(notes)


def prepare(root: Path, tag: str, repository: str) -> str:
    """Writes the addresses; gives what CHANGELOG.md says of the version. SystemExit."""
    if not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", repository):
        sys.exit(
            f"repository={repository!r}: expected an address like https://github.com/me/distorch"
        )
    version = check_version(root, tag)
    check_published(root)
    notes = absolute("CHANGELOG.md", changes(root, version), root, repository, tag)
    readme = root / "README.md"
    ours, nodes = root / "pyproject.toml", root / "comfyui-distorch" / "pyproject.toml"
    written = {
        readme: absolute("README.md", readme.read_text(), root, repository, tag),
        ours: with_urls(ours, urls(repository, tag)),
        nodes: with_urls(nodes, f'[project.urls]\nRepository = "{repository}"\n'),
    }
    for file, text in written.items():
        file.write_text(text)
    return notes


def with_urls(file: Path, table: str) -> str:
    """A pyproject.toml with a table of addresses: behind the project's own, before the next."""
    text = file.read_text()
    if re.search(r"^\[project\.urls\]", text, re.MULTILINE):
        sys.exit(f"{file} has [project.urls] already: expected a fresh checkout")
    end = text.index("\n[", text.index("[project]"))
    return f"{text[: end + 1]}{table}\n{text[end + 1 :]}"


def check_version(root: Path, tag: str) -> str:
    """The version, if it is the tag's and the same everywhere."""
    found = {
        "distorch/__init__.py": VERSION,
        "comfyui-distorch/pyproject.toml": NODES_VERSION,
    }
    for file, pattern in found.items():
        match = pattern.search((root / file).read_text())
        if match is None or f"v{match[1]}" != tag:
            sys.exit(f"{file} has version {match and match[1]}, and the tag is {tag}")
    return tag[1:]


def changes(root: Path, version: str) -> str:
    """This version's part of CHANGELOG.md, which has to have a date."""
    for part in (root / "CHANGELOG.md").read_text().split("\n## ")[1:]:
        head, _, text = part.partition("\n")
        if head.split()[0] == version:
            if not re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", head):
                sys.exit(f"CHANGELOG.md has {head!r}: expected {version} - YYYY-MM-DD")
            return text.strip() + "\n"
    raise SystemExit(f"CHANGELOG.md has no part '## {version} - YYYY-MM-DD'")


def check_published(root: Path) -> None:
    """SystemExit while a page says that there is nothing on PyPI."""
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    if saying := [page.name for page in pages if UNPUBLISHED.search(page.read_text())]:
        sys.exit(f"{', '.join(saying)}: they still say that distorch is not on PyPI yet")


def absolute(page: str, text: str, root: Path, repository: str, tag: str) -> str:
    """The text of a page, whose links to files of the repository then work everywhere."""
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/")

    def replace(match: re.Match[str]) -> str:
        picture, before, target, after = match.groups()
        path, _, anchor = target.partition("#")
        if not (root / path).exists():
            sys.exit(f"{page} links to {path}, which is not there")
        base = f"{raw}/{tag}" if picture else f"{repository}/blob/{tag}"
        return f"{picture}{before}{base}/{path}{'#' if anchor else ''}{anchor}{after}"

    return LINK.sub(replace, text)


def urls(repository: str, tag: str) -> str:
    """The table of addresses that PyPI shows."""
    return (
        "[project.urls]\n"
        f'Homepage = "{repository}"\n'
        f'Documentation = "{repository}/blob/{tag}/docs/README.md"\n'
        f'Changelog = "{repository}/blob/{tag}/CHANGELOG.md"\n'
        f'Issues = "{repository}/issues"\n'
    )


if __name__ == "__main__":
    main()
