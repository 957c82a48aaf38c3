"""The house keeps its floors: a file imports from lower floors or from its own folder, and pandas in two files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import torch_secorder
from benchmarks import calls
from processes import fresh

ROOT = Path(torch_secorder.__file__).parent
FLOORS = [  # from the ground up; rooms on one floor don't know each other
    ["errors", "version"],
    ["arguments", "likelihoods", "tables", "plotting"],
    ["model"],
    ["autograd"],
    ["batch_axis"],
    ["per_sample"],
    ["capture"],
    ["rules"],
    ["graph"],
    ["recording"],
    ["running", "results", "noise_scale"],
    ["verification", "curvature"],
    ["monitor", "approximations", "losses"],
    ["pruning", "quantization", "testing", "integrations"],
    ["cli"],  # its command `check` is that of testing
    ["__main__"],  # `python -m torch_secorder`
]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def room(file: str) -> str:
    """The file at the top of the package, or the folder, that `file` is or belongs to."""
    return file.split("/")[0].removesuffix(".py")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs: all but what is only there for the type checker."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield child
            yield from statements(child)


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


@cache
def imports(file: str) -> tuple[str, ...]:
    """Every module that `file` imports, at its top or inside a function."""
    return tuple(_imports(file))


def _imports(file: str) -> Iterator[str]:
    for node in statements(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            yield from ([f"{module}.{alias.name}" for alias in node.names] if module == "torch_secorder" else [module])


FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def test_every_file_has_a_floor() -> None:
    assert {room(file) for file in FILES} - {"__init__"} == set(FLOOR_OF)


def goes_down(file: str, module: str) -> bool:
    below = module.split(".")[1]
    return (below == room(file) and "/" in file) or FLOOR_OF[below] < FLOOR_OF[room(file)]


def test_imports_go_down() -> None:
    own = [(file, module) for file in FILES for module in imports(file) if module.split(".")[0] == "torch_secorder"]
    up = [f"{file} imports {module}" for file, module in own if file != "__init__.py" and not goes_down(file, module)]
    assert len(own) > len(FILES)
    assert not up, "\n".join(up)


def test_pandas_lives_in_reports_and_tables() -> None:
    """Annotations of a DataFrame may be strings elsewhere."""
    using = [file for file in FILES if any(module.split(".")[0] == "pandas" for module in imports(file))]
    assert using == ["results/report.py", "tables.py"]


def test_names_say_what_is_inside() -> None:
    parts = {part.removesuffix(".py") for file in FILES for part in file.split("/")}
    assert not {"utils", "helpers", "common", "misc"} & parts
    functions = [
        f"{file}: {node.name}"
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith(("compute_", "get_"))
    ]
    assert not functions, "\n".join(functions)


PRIVATE = re.compile(
    r"torch\._[a-zA-Z]|torch\.[\w.]*\._[a-zA-Z]|from torch(\.\w+)* import _|from torch(\.\w+)*\._"  # modules and their names
    r"|_execution_engine|_input_metadata|_(raw_)?saved_|_functorch|_python_dispatch|_unsafe_preserve_version_counter"
    r"|(?<!self)(?<!per_sample)\._(version|base|is_view|backward_hooks)\b|\b_(NormBase|BatchNorm|InstanceNorm|ConvNd|ConvTransposeNd)\b"
    r"|_reversed_padding_repeated_twice"
)


def private_names(*, in_autograd: bool) -> dict[str, str]:
    """Each of torch's private names in the package's files -> the line that has it."""
    lines = [
        (file, line)
        for file in FILES
        if file.startswith("autograd/") == in_autograd
        for line in (ROOT / file).read_text().splitlines()
    ]
    return {match[0]: f"{file}: {line}" for file, line in lines for match in PRIVATE.finditer(line)}


def test_torchs_private_names_stand_in_autograd_only() -> None:
    assert not (found := private_names(in_autograd=False)), "\n".join(found.values())


def test_the_search_for_private_names_finds_some() -> None:
    assert {
        "torch._C",
        "_saved_",
        "_raw_saved_",
        "_input_metadata",
        "._version",
        "._base",
        "._backward_hooks",
    } <= private_names(in_autograd=True).keys()


def test_the_public_names() -> None:
    for name in (
        "FisherMonitor",
        "fisher_report",
        "register_rule",
        "empirical_fisher_trace",
        "generalized_fisher_trace",
    ):
        assert name in torch_secorder.__all__
        assert getattr(torch_secorder, name).__doc__
    assert (ROOT / "py.typed").exists()


def counted() -> tuple[int, int]:
    """The calls of a steady step, and its changes of file."""
    steady = calls.steps()["monitor, step 8 (steady)"]()
    return len(steady.files), steady.changes


def test_a_steady_monitor_step_stays_short() -> None:
    """What happens in every step is to be read in one go, and not in leaps from file to file.

    It is counted in a process of its own: what other tests have left in this one may add a few calls.
    """
    with ProcessPoolExecutor(1, fresh()) as pool:
        found, changes = pool.submit(counted).result()
    assert 0 < found <= 180
    assert 0 < changes <= 80
