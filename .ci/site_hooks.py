"""What `make docs` adds to mkdocs, which calls the `on_…` functions (`hooks:` in mkdocs.yml).

Names in the text become links, the help of the command line and the methods that `preset` makes are
filled in, and the reference is checked to show every public name. A warning from here ends the
build with an error, as any other does.
"""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import griffe

from coup_fast.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger("mkdocs.hooks.site")

# Modules whose public names the reference has to show: those of `__all__`, or the functions and
# classes that a module without `__all__` defines.
PUBLIC = (
    "coup_fast",
    "coup_fast.attacks",
    "coup_fast.data",
    "coup_fast.evaluation",
    "coup_fast.gradient_check",
    "coup_fast.integrations.art",
    "coup_fast.integrations.diffpure",
    "coup_fast.integrations.diffusers",
    "coup_fast.integrations.pictures",
    "coup_fast.methods",
    "coup_fast.models",
    "coup_fast.noise",
    "coup_fast.ops",
    "coup_fast.options",
    "coup_fast.plan",
    "coup_fast.reference",
    "coup_fast.schedules",
    "coup_fast.stiffness",
    "coup_fast.training",
)
# What pages are made of. Markdown takes `<h, x>` in a docstring for a tag, and shows nothing.
TAG = re.compile(
    "a|abbr|autoref|b|blockquote|br|button|code|details|div|em|h[1-6]|hr|img|input|label|li|ol|p|"
    "path|pre|small|span|strong|sub|summary|sup|svg|table|tbody|td|th|thead|tr|ul"
)
REMOTE = re.compile(r'<(?:script|img|link)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"')


class Methods(griffe.Extension):
    """Shows methods that `preset` makes as the functions that they are, with their docstrings."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Replace the assignments `name = preset(…)` that Griffe reads by what Python makes."""
        module = pkg["methods.sde"]
        made = griffe.inspect(module.name, filepath=module.filepath, parent=pkg["methods"])
        for name, member in list(module.members.items()):
            if isinstance(member, griffe.Attribute) and str(member.value).startswith("preset("):
                module.set_member(name, made[name])


@cache
def package() -> griffe.Module:
    """The package as mkdocstrings reads it."""
    extensions = griffe.load_extensions(Methods)
    found = griffe.load("coup_fast", search_paths=[str(ROOT)], extensions=extensions)
    assert isinstance(found, griffe.Module)
    return found


def public_objects(pkg: griffe.Module) -> Iterator[tuple[str, griffe.Object | griffe.Alias]]:
    """Every public name, dotted, and what it stands for; modules and `__version__` are left out."""
    for path in PUBLIC:
        module = pkg[path.partition(".")[2]] if "." in path else pkg
        own = [
            name
            for name, member in module.members.items()
            if not (name.startswith("_") or member.is_alias)
            and (member.is_function or member.is_class)
        ]
        for name in map(str, own if module.exports is None else module.exports):
            if path == "coup_fast.plan" and name.isupper():
                continue  # columns, which are numbers: the page of the module says what they are
            found = module[name]
            if found.is_module:  # `methods.gdmp` is the function that the module of its name holds
                found = found.members.get(name, found)
            if not found.is_module and name != "__version__":
                yield f"{path}.{name}", found


def problems(pkg: griffe.Module, shown: set[str]) -> list[str]:
    """What is missing of the public names, in words. shown: dotted names in the reference."""
    found = []
    for name, member in public_objects(pkg):
        if not {name, member.canonical_path} & shown:
            found.append(f"no page of the reference shows {name}")
        if not member.has_docstring:
            found.append(f"{name} has no docstring")
    return found


def on_post_build(config: Any) -> None:
    """Warn of missing names, and of files that a page would fetch from another place."""
    site = Path(config.site_dir)
    lines = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    for problem in problems(package(), {line.split(" ")[0] for line in lines.splitlines()}):
        log.warning(problem)
    for page in sorted(site.rglob("*.html")):
        for tag in REMOTE.findall(page.read_text()):
            log.warning("%s is not for reading offline: %s", page.relative_to(site), tag)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace `<!-- coup-fast purify --help -->` by what that command prints."""

    def output(match: re.Match[str]) -> str:
        return f"```text\n{command_help(match[1])}```"

    return re.sub(r"^<!-- coup-fast (\w+ )?--help -->$", output, markdown, flags=re.M)


def command_help(name: str | None) -> str:
    """What `coup-fast [name] --help` prints on a terminal of 88 columns."""
    parser = build_parser()
    with mock.patch.dict(os.environ, COLUMNS="88"):
        if name is None:
            return parser.format_help()
        (commands,) = (a for a in parser._actions if isinstance(a.choices, dict))
        return str(commands.choices[name.strip()].format_help())


@cache
def short_names() -> dict[str, str]:
    """Public name without its module -> with it; the first of several."""
    names: dict[str, str] = {}
    for dotted, _ in public_objects(package()):
        names.setdefault(dotted.rpartition(".")[2], dotted)
    return names


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Turn `coup_fast.…` names, and in the reference bare public names, into links."""
    for tag in sorted(set(re.findall(r"<([^\s/>!]+)", html))):
        if not TAG.fullmatch(tag):
            log.warning("%s: <%s> is no tag; write ⟨⟩, or put it in code", page.file.src_uri, tag)
    in_reference = page.file.src_uri.startswith("api/")

    def link(match: re.Match[str]) -> str:
        name = match[1]
        dotted = name if name.startswith("coup_fast.") else short_names().get(name)
        if dotted is None or not (in_reference or dotted == name):
            return match[0]
        return f'<autoref identifier="{dotted}" optional>{match[0]}</autoref>'

    parts = re.split(r"(<(a|h\d|autoref|pre)\b.*?</\2>)", html, flags=re.S)
    del parts[2::3]  # the second group
    for place in range(0, len(parts), 2):
        parts[place] = re.sub(r"<code>([\w.]+)</code>", link, parts[place])
    return "".join(parts)
