"""Tables in files, each written as a whole or not at all."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_secorder.cli.failures import CommandError
from torch_secorder.plotting import bars, styled

if TYPE_CHECKING:
    import pandas as pd

MOST_BARS = 100


def check_targets(paths: Iterable[Path]) -> None:
    """Refuse, before the work, files that could not be written after it.

    Raises:
        CommandError: naming a path that is a folder, is in none, or is given twice.
    """
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise CommandError(f"cannot write {path}: it is given for two files")
        seen.add(path.resolve())
        if path.is_dir() or not path.absolute().parent.is_dir():
            reason = "is a folder" if path.is_dir() else f"is in {path.absolute().parent.name}/, which does not exist"
            raise CommandError(f"cannot write {path}: it {reason}")


def write(contents: Mapping[Path, bytes]) -> None:
    """Write whole files or none: each is complete beside its place before the first is moved there."""
    ready: list[tuple[str, Path]] = []
    try:
        for path, content in contents.items():
            with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=".", delete=False) as file:
                ready.append((file.name, path))
                file.write(content)
            os.chmod(file.name, 0o666 & ~_umask())
        for name, path in ready:
            os.replace(name, path)
    except OSError as error:
        raise CommandError(f"cannot write {error.filename or 'the files'}: {error.strerror}") from error
    finally:
        for name, _ in ready:
            Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _csv(report: pd.DataFrame) -> bytes:
    return report.assign(**{str(name): value for name, value in report.attrs.items()}).to_csv().encode()


def _json(report: pd.DataFrame) -> bytes:
    rows = [{key: _plain(value) for key, value in row.items()} for row in report.reset_index().to_dict("records")]
    facts = {str(name): _plain(value) for name, value in report.attrs.items()}
    return (json.dumps(facts | {"rows": rows}, indent=1, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _html(report: pd.DataFrame) -> bytes:
    facts = report.attrs
    caption = f"{facts['fisher']} Fisher, {facts['reduction']} over {facts['n_samples']:,} samples"
    style = styled(report).set_caption(caption)
    return str(style.to_html(doctype_html=True)).encode()


def _png(report: pd.DataFrame) -> bytes:
    from matplotlib.figure import Figure

    rows = min(len(report), MOST_BARS)
    figure = Figure(figsize=(8, 0.28 * rows + 1.4), layout="constrained")
    axes = bars(report, top=rows, ax=figure.subplots())
    if rows < len(report):
        axes.set_title(f"The {rows} largest of {len(report):,} rows", loc="left", fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[pd.DataFrame], bytes]] = {"csv": _csv, "json": _json, "html": _html, "png": _png}
