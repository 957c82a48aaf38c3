import sys
from importlib import import_module
from importlib.metadata import version as installed
from pathlib import Path
from pkgutil import walk_packages

import matplotlib.axes
import pandas
import typing_extensions

import torch_secorder

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the page with pictures draws those of an example

# What modules import for type checkers only is given to them here, so that signatures show what their types stand for.
FOR_TYPES = {
    "pd": pandas,
    "Self": typing_extensions.Self,
    "Unpack": typing_extensions.Unpack,
    "Axes": matplotlib.axes.Axes,
}
for _module in walk_packages(torch_secorder.__path__, "torch_secorder."):
    if not _module.name.endswith("__main__"):
        _names = vars(import_module(_module.name))
        _names.update({name: value for name, value in FOR_TYPES.items() if name not in _names})

project = "torch-secorder"
author = "torch-secorder contributors"
copyright = "2026, torch-secorder contributors"
version = release = installed("torch-secorder")

extensions = [
    *("sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.doctest", "sphinx.ext.intersphinx"),
    "sphinx-mathjax-offline",  # formulas without a network
    "myst_parser",  # the changelog
    "matplotlib.sphinxext.plot_directive",  # the page with pictures
]
exclude_patterns = ["_build", "concepts/_*.rst"]

# Names of other projects are links where their inventories lie in docs/inventories, so that a build takes no network.
INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "matplotlib": "https://matplotlib.org/stable/",
}
_files = {name: Path(__file__).parent / "inventories" / f"{name}.inv" for name in INVENTORIES}
intersphinx_mapping = {name: (INVENTORIES[name], str(file)) for name, file in _files.items() if file.exists()}

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"torch-secorder {release}"

plot_formats = [("png", 110)]
plot_html_show_formats = plot_html_show_source_link = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88

doctest_test_doctest_blocks = ""  # docstrings are tested by `make doctest`
doctest_global_setup = "import torch; from torch import nn; torch.manual_seed(0)"
