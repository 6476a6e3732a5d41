"""Two documentation pages that cannot become stale: mkdocs makes them from the schema and the commands.

A hook of mkdocs (see mkdocs.yml). Nothing that it writes is committed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from fopd_cli import cli
from fopd_cli.recipe import explain
from fopd_cli.recipe.renames import RENAMED, new_name

Key = tuple[str, str, str, str]  # the key, its type, its default, its meaning

KEYS_INTRO = """\
# Recipe keys

Every key of a recipe: its type, its default, and what it means. `fopd recipe --explain SECTION` prints the
same in a terminal.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs before it builds the navigation."""
    for name, text in (("keys.md", keys_page()), ("cli.md", cli_page())):
        files.append(File.generated(config, f"reference/{name}", content=text))
    return files


def keys_page() -> str:
    """A table for each section of the schema. A section's own keys may stand before and after those of a
    section within it.
    """
    sections: dict[str, list[Key]] = {}
    for found in explain():
        sections.setdefault(_section(found[0]), []).append(found)
    lines = [KEYS_INTRO]
    for section, keys in sections.items():
        lines += [f"## {section}", ""]
        lines += [f"Its old name, `{old}`, is read for one more version.\n" for old in _old_names(section)]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *_rows(keys), ""]
    return "\n".join(lines)


def cli_page() -> str:
    """Every command, with its --help."""
    command = typer.main.get_command(cli.app)
    context = typer.Context(command, info_name="fopd")
    return str(get_docs_for_click(obj=command, ctx=context, name="fopd", title="Commands"))


def _section(key: str) -> str:
    return key.rpartition(".")[0] or "Top level"


def _old_names(key: str) -> list[str]:
    return [old for old in RENAMED if new_name(old) == key]


def _rows(keys: Iterable[Key]) -> Iterator[str]:
    for key, kind, default, meaning in keys:
        meaning += "".join(f" Its old name, {old}, is read for one more version." for old in _old_names(key))
        alternatives = " or ".join(f"`{one}`" for one in kind.split(" | "))
        yield f"| `{key.rpartition('.')[2]}` | {alternatives} | `{default}` | {_escaped(meaning)} |"


def _escaped(text: str) -> str:
    """Plain text for a cell, with Markdown's and HTML's own characters escaped."""
    return "".join(f"&#{ord(c)};" if c in "\\`*_{}[]<>|" else c for c in text)
