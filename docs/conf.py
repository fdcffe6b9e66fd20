"""How `sphinx-build` makes the pages of this folder, and the reference from docstrings."""

import inspect
import re
from typing import Any

from sphinx.util.inspect import stringify_signature

import jaxpipe

project = "jaxpipe"
version = release = jaxpipe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3

default_role = "py:obj"  # `name` in a docstring links to what it names, or is code if no page has that name
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # a list; types stand in the signature
autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"jaxpipe {release}"
html_copy_source = False
html_show_copyright = False


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _letters, priority=400)  # before napoleon


def _skip(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out fields that have nothing but the docstring that every named tuple gives them."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def _signature(app: Any, what: str, name: str, item: Any, options: Any, signature: str | None, returns: str | None):
    """The parameters of `__init__` where a metaclass hides them (Flax), and no defaults that are not Python."""
    if signature is None:
        return None
    if what == "class" and signature == "(*args: Any, **kwargs: Any)":
        own = inspect.signature(item.__init__)
        own = own.replace(parameters=list(own.parameters.values())[1:], return_annotation=inspect.Signature.empty)
        signature = stringify_signature(own, unqualified_typehints=True)
    return re.sub(r"<factory>|<function \w+>", "...", signature), returns


def _letters(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Keeps a lone ``V.`` from being read as item 22 of a list."""
    lines[:] = [re.sub(r"(^\s*|: )([A-Z]\.)(?= |$)", r"\1\\\2", line) for line in lines]
