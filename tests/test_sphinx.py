"""The site of docs builds without a warning, and its reference has every public name."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpipe import errors

DOCS = Path(__file__).parents[1] / "docs"

MODULES = {
    "jaxpipe": "jaxpipe",
    "jaxpipe.schedule": "schedule",
    "jaxpipe.schedule.show": "schedule",
    "jaxpipe.nn": "nn",
    "jaxpipe.infer": "infer",
    "jaxpipe.models.gpt": "models",
    "jaxpipe.models.encdec": "models",
}
"""Modules whose `__all__` is public, and the page of docs/api that describes them."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built pages. A warning, such as one of a link to nowhere, fails the build."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", out / "trees", DOCS, out / "html"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_page_is_built_and_reached_from_the_first(site):
    pages = {str(path.relative_to(DOCS).with_suffix(".html")) for path in DOCS.rglob("*.md")}
    first = (site / "index.html").read_text()
    assert [page for page in pages if not (site / page).exists()] == []
    assert [page for page in pages - {"index.html"} if f'href="{page}"' not in first] == []


@pytest.mark.parametrize(("module", "page"), MODULES.items())
def test_the_reference_describes_every_public_class_and_function(module, page, site):
    html = (site / "api" / f"{page}.html").read_text()
    public = importlib.import_module(module)
    names = [name for name in public.__all__ if callable(getattr(public, name))]
    assert names
    assert [name for name in names if f'id="{module}.{name}"' not in html] == []


def test_the_reference_describes_every_error(site):
    html = (site / "api" / "errors.html").read_text()
    names = [name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__]
    assert [name for name in names if f'id="jaxpipe.errors.{name}"' not in html] == []


def test_flax_modules_show_the_parameters_of_their_own(site):
    assert "*args" not in (site / "api" / "models.html").read_text()


def test_a_lone_letter_is_not_read_as_a_numbered_list(site):
    assert [page.name for page in (site / "api").glob("*.html") if 'class="upperalpha' in page.read_text()] == []
