"""Jinja2 templates in workflow files: environment variables, and limits for anything else.

`{{ NAME }}` and `{{ NAME | default("x") }}` are rendered in this process. Any other template can need arbitrary time
and memory, for example `{{ 9**(9**9) }}`, and is rendered in a process of its own with limits.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jinja2
import jinja2.nodes
import jinja2.sandbox

from qfast.errors import ConfigError

__all__ = ["render_template"]

log = logging.getLogger("qfast")

MOST_CHARACTERS = 2 << 20
MOST_SECONDS = 10
WAIT_SECONDS = 60  # the process may wait for a busy processor, so its limit of processor time usually ends it first
MOST_MEMORY = 1 << 30
PLAIN = (jinja2.nodes.TemplateData, jinja2.nodes.Name, jinja2.nodes.Const)
DEFAULT = ("default", "d")  # both names of Jinja2's filter
SCRIPT = Path(__file__).with_name("template_process.py")
REMEDY = "Remedy: write the values into the file."


def render_template(text: str, file: Path) -> str:
    """Render the text of a workflow file.

    Parameters
    ----------
    text : str
    file : Path
        The workflow file, for messages.

    Raises
    ------
    ConfigError
        The template is invalid, or needs more than 10 seconds, 1 GiB of memory or 2 MiB of text.

    Examples
    --------
    >>> render_template("a: {{ NO_SUCH_NAME | default('x') }}", Path("w.yaml"))
    'a: x'
    """
    # Without the sandbox, a template could access Python's internals.
    environment = jinja2.sandbox.SandboxedEnvironment()
    try:
        # Only parsing is harmless. Any analysis of the tree, such as jinja2.meta, computes its constants.
        tree = environment.parse(text)
        names = {node.name for node in tree.find_all(jinja2.nodes.Name)}
        variables = {name: os.environ[name] for name in names if name in os.environ}
        if not _is_simple(tree):
            rendered, names = _render_apart(text, variables, file)
        else:
            rendered = environment.from_string(text).render(variables)
        missing = sorted(name for name in names - _defaulted(tree) if name not in os.environ)
        if missing:
            log.warning("%s: environment variables %s are not set; they are rendered as empty text", file, missing)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{file}: template error on line {error.lineno}: {error.message}") from None
    except ConfigError:
        raise
    except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: the template does not render: {error}") from None
    except RecursionError:
        raise ConfigError(f"{file}: the template does not render: it is nested too deeply. {REMEDY}") from None
    if len(rendered) > MOST_CHARACTERS:
        raise ConfigError(_too_long(file))
    return rendered


def _defaulted(template: jinja2.nodes.Template) -> set[str]:
    """Variables that occur only as `{{ NAME | default(...) }}`, so it does not matter whether they are set."""
    filters = [node for node in template.find_all(jinja2.nodes.Filter) if node.name in DEFAULT]
    inside = [node.node for node in filters if isinstance(node.node, jinja2.nodes.Name)]
    others = [node.name for node in template.find_all(jinja2.nodes.Name) if all(node is not one for one in inside)]
    return {node.name for node in inside} - set(others)


def _is_simple(template: jinja2.nodes.Template) -> bool:
    """Whether a template consists of text, variables and variables with a default."""
    for part in template.body:
        for node in part.nodes if isinstance(part, jinja2.nodes.Output) else [part]:
            values: list[jinja2.nodes.Node | None] = [node]
            if isinstance(node, jinja2.nodes.Filter) and node.name in DEFAULT and not node.kwargs:
                values = [node.node, *node.args]
            if not all(isinstance(value, PLAIN) for value in values):
                return False
    return True


def _render_apart(text: str, variables: Mapping[str, str], file: Path) -> tuple[str, set[str]]:
    """Render a template in a process with limits. Also returns the names of its variables."""
    job = {
        "text": text,
        "variables": variables,
        "characters": MOST_CHARACTERS,
        "memory": MOST_MEMORY,
        "seconds": MOST_SECONDS,
        "path": sys.path,
    }
    command = [sys.executable, "-I", "-S", str(SCRIPT)]
    try:
        process = subprocess.run(
            command, input=json.dumps(job).encode(), capture_output=True, timeout=WAIT_SECONDS, check=False
        )
        result = json.loads(process.stdout) if process.returncode == 0 else {"error": "killed"}
    except subprocess.TimeoutExpired:
        result = {"error": "killed"}
    except OSError as error:
        raise ConfigError(f"{file}: the template cannot be rendered: {error}. {REMEDY}") from None
    problems = {
        "size": _too_long(file),
        "memory": f"{file}: the template needs more than {MOST_MEMORY >> 20} MiB of memory. {REMEDY}",
        "killed": f"{file}: the template needs more than {MOST_SECONDS} seconds or {MOST_MEMORY >> 20} MiB. {REMEDY}",
        "syntax": f"{file}: template error on line {result.get('line')}: {result.get('message')}",
        "other": f"{file}: the template does not render: {result.get('message')}",
    }
    if "error" in result:
        raise ConfigError(problems[result["error"]])
    return str(result["text"]), set(result["names"])


def _too_long(file: Path) -> str:
    return f"{file}: the template renders to more than {MOST_CHARACTERS} characters. {REMEDY}"
