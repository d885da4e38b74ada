"""What `make docs` needs beside MkDocs: the page of the command line, links to source files, and no foreign asset.

`python docs/build.py` writes docs/command-line.md from the commands themselves. MkDocs calls the functions `on_...`
(mkdocs.yml, `hooks`).
"""

import json
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "command-line.md"
OUTSIDE = re.compile(r"\]\((?P<up>(?:\.\./)+)(?P<path>[\w./-]+\.(?:py|ipynb))\)")
ASSET = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?(?P<address>(?:https?:)?//[^\"'> ]+)"
)
"""What a browser fetches by itself; a link that a reader follows is none."""
HEADER = "| | default | |\n| --- | --- | --- |"
log = logging.getLogger("mkdocs.hooks.build")


# ---- the command line ----


def command_line_page() -> str:
    """docs/command-line.md, made of the commands that `atv --help` lists."""
    from typer.main import get_command

    from atv.cli.app import app

    commands = dict(_commands(get_command(app)))
    head = f"""# Command line

Written by `make docs` from the commands themselves; a test compares the two. `atv --help` and `atv COMMAND --help` say
the same.

{chr(10).join(f"- [`atv {name}`](#atv-{name.replace(' ', '-')})" for name in commands)}

Every option of a command that has `--config` can be in a TOML file, in a table named after the command: `[train]`,
`[paper.reproduce]`. The same file can hold [settings of methods](#settings-of-methods), in a table for each, as
`[lora]`, and in `[all]` for every method that has such a setting. In `atv train` the command's table wins over the
methods', and flags win over both.

A mistake in what is given is answered with one line and exit code 2. `atv doctor` exits with 1 if a check failed.
Ctrl-C ends with 130; where the same command resumes the work, a line says so.
"""
    return head + "".join(_command(name, command) for name, command in commands.items()) + _settings()


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """The commands of a group and of the groups in it, with their names."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join([f"atv {name} [OPTIONS]", *(_argument(p) for p in arguments)])
    lines = [f"\n## atv {name}\n", command.help, "", "```text", usage, "```", "", HEADER]
    lines += [f"| `{p.name.upper()}` | {_default(p)} | {_cell(p.help)} |" for p in arguments]
    lines += [_row(command, p) for p in options]
    return "\n".join(lines) + "\n"


def _settings() -> str:
    """For each method what `atv train --method NAME --help` shows otherwise than `atv train --help`."""
    from atv.cli.commands import for_method
    from atv.methods import TRAINED

    def rows(name: str) -> dict[str, str]:
        command = for_method(print, name, ())
        return {p.name: _row(command, p) for p in command.params if p.name not in ("method", "help")}

    default = rows("atv")
    text = """
## Settings of methods

The options of `atv train` are those of the method that is trained. Those of the method `atv` are above; here are the
options of other methods that differ in name, default or meaning. `atv train --method NAME --help` shows all of them.
"""
    for name in TRAINED:
        own = [row for option, row in rows(name).items() if row != default.get(option)]
        if own:
            text += "\n".join([f"\n### {name}\n", HEADER, *own]) + "\n"
    return text


def _row(command: Any, option: Any) -> str:
    kind = get_type_hints(command.callback)[option.name]
    return f"| `{_cell(_flags(option, kind))}` | {_default(option)} | {_cell(option.help)} |"


def _argument(parameter: Any) -> str:
    name = f"{parameter.name.upper()}{'...' if parameter.nargs == -1 else ''}"
    return name if parameter.required else f"[{name}]"


def _flags(parameter: Any, kind: Any) -> str:
    if bool in (kind, *get_args(kind)):
        return ", ".join([*parameter.opts, *parameter.secondary_opts])
    # From the annotation: how a parsed option knows its type differs between versions of typer.
    named = {int: "NUMBER", float: "NUMBER", Path: "PATH", str: "TEXT"}
    types = {*get_args(kind), kind, *(inner for part in get_args(kind) for inner in get_args(part))}
    value = parameter.metavar or next(word for found, word in named.items() if found in types)
    return f"{', '.join(parameter.opts)} {value}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value in (None, "", False) or callable(value):
        return ""
    return "`" + str(value).replace("\n", "\\n") + "`"


def _cell(text: str) -> str:
    return text.replace("\\[", "[").replace("|", "\\|")


# ---- MkDocs ----


def on_files(files: Any, config: Any) -> Any:
    """Make a page of every source file that a page links to: on a code host the link leads to the file itself."""
    from mkdocs.structure.files import File, InclusionLevel

    linked = {path for page in files.documentation_pages() for path in _linked(page.src_uri, page.content_string)}
    for path in sorted(linked):
        files.append(
            File.generated(config, f"source/{path}.md", content=source_page(path), inclusion=InclusionLevel.NOT_IN_NAV)
        )
    return files


def source_page(path: str) -> str:
    """The page of a source file: its code; of a notebook, its text with the code between."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".ipynb"):
        return f"# {path}\n\n````python\n{text}````\n"
    # Links between notebooks lead to their pages, which lie side by side.
    parts = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(
        re.sub(r"\]\((\w+\.ipynb)\)", r"](\1.md)", part) if kind == "markdown" else f"````python\n{part}\n````"
        for kind, part in parts
    )


def _linked(page: str, markdown: str) -> list[str]:
    """Files outside docs/ that a page links to, relative to the repository."""
    here = posixpath.dirname(f"docs/{page}")
    found = [posixpath.normpath(posixpath.join(here, link["up"], link["path"])) for link in OUTSIDE.finditer(markdown)]
    return [path for path in found if not path.startswith("docs/") and (ROOT / path).is_file()]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to source files to their pages."""
    here = posixpath.dirname(f"docs/{page.file.src_uri}")

    def to_page(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, link["up"], link["path"]))
        return (
            f"]({posixpath.relpath(f'docs/source/{path}.md', here)})"
            if _linked(page.file.src_uri, link[0])
            else link[0]
        )

    return OUTSIDE.sub(to_page, markdown)


def on_post_build(config: Any) -> None:
    """Warn, which ends a strict build, if a page would make a browser fetch something from elsewhere."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        for address in foreign_assets(path.read_text(encoding="utf-8")):
            log.warning("%s fetches %s; expected nothing from another host: copy it into docs/.", path, address)


def foreign_assets(html: str) -> list[str]:
    """Addresses on other hosts that a browser fetches by itself to show a page."""
    return [found["address"] for found in ASSET.finditer(html)]


if __name__ == "__main__":
    PAGE.write_text(command_line_page(), encoding="utf-8")
