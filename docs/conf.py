"""The site: `bash scripts/docs.sh` builds it. Its source is the whole repository, so that links are those of GitHub."""

import re
from pathlib import Path

import phantom

project = "phantom"
author = copyright = "The phantom authors"
version = release = phantom.__version__

root_doc = "docs/index"
include_patterns = ["docs/**.md", "docs/notebooks/*.ipynb", "results/**.md", "weights/**.md", "scripts/*.md", "*.md"]
# folders that are not looked into
exclude_patterns = [".*", "**/__pycache__", "docs/_*", "runs", "wandb", "outputs", "multirun", "*.egg-info"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
# the pages of results/ are reached by links; a test says that the index names every page of docs/
suppress_warnings = ["toc.not_included"]

myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / "notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 120

highlight_language = "none"
smartquotes_action = "D"  # dashes; quotes stay as they are
default_role = "code"
maximum_signature_line_length = 80
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Map", "State", "OnFailure")}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"phantom {release}"
html_copy_source = html_show_sourcelink = html_use_index = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_additional_pages = {"index": "forward.html"}  # the root of the site leads to docs/index


def escape(app, what, name, obj, options, lines) -> None:
    """Keep what docstrings write as plain text, |f(z)| and z*, from being read as markup."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        lines[i] = "".join(part if part[:1] == "`" else re.sub(r"[|*]", r"\\\g<0>", part) for part in parts)


def setup(app) -> None:
    app.connect("autodoc-process-docstring", escape, priority=1)  # before napoleon, whose markup is to stay
