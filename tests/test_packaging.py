"""What is installed is whole, and importing it from anywhere harms nobody."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from vllm_prinmix.kernels.native import HEADERS, SOURCE

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: left-overs of an earlier build in build/lib would be packed too."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("vllm_prinmix", "compress", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def sources() -> set[str]:
    """Every module of the package as the wheel must hold it."""
    found = {f"vllm_prinmix/{p.name}" for p in (ROOT / "vllm_prinmix").glob("*.py")}
    for folder in ("cli", "format"):
        found |= {f"vllm_prinmix/{folder}/{p.name}" for p in (ROOT / "vllm_prinmix" / folder).glob("*.py")}
    for folder in ("compress", "kernels"):
        found |= {f"vllm_prinmix/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*.py")}
    return found


def test_the_wheel_has_every_module_and_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    native = {
        f"vllm_prinmix/kernels/{p.name}" for p in (ROOT / "kernels").glob("*") if p.suffix in (".cpp", ".h")
    }
    assert names == sources() | native
    assert set(HEADERS) | {SOURCE.name} == {Path(name).name for name in native}, "what a build depends on"


def test_the_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """Dependencies are lent by this environment, the project itself is not."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    target = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert installed.returncode == 0, installed.stderr
    lent = next(p for p in sys.path if p.endswith("site-packages"))
    (target / "lent.pth").write_text(lent + "\n")
    modules = sorted(name.removesuffix(".py").replace("/", ".") for name in sources())
    modules = [name.removesuffix(".__init__") for name in modules]
    script = (
        "import importlib, importlib.metadata as m, vllm_prinmix\n"
        f"assert vllm_prinmix.__file__.startswith({str(target)!r}), vllm_prinmix.__file__\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "points = {p.value for p in m.distribution('vllm-prinmix').entry_points}\n"
        "assert points == {'vllm_prinmix.cli:main', 'vllm_prinmix.plugin:register'}, points\n"
    )
    done = subprocess.run(
        [str(python), "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_distribution_named_kernels_stays_usable(tmp_path: Path) -> None:
    """transformers looks for Hugging Face's `kernels`; from the repository root it must not find ours."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(
        "def __getattr__(name):\n    if name.startswith('__'):\n        raise AttributeError(name)\n"
        "    return type(name, (), {})\n"
    )
    info = tmp_path / "kernels-0.11.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.11.0\n")
    script = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import transformers, vllm_prinmix.kernels.packing, vllm_prinmix.kernels.cpu, kernels\n"
        "from transformers import Qwen2ForCausalLM\n"
        f"assert kernels.__file__.startswith({str(tmp_path)!r}), kernels.__file__\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_the_package_is_light() -> None:
    """vLLM imports it in every process; torch and vllm must not come with it."""
    script = (
        "import sys, vllm_prinmix, vllm_prinmix.plugin\n"
        "heavy = {'torch', 'vllm', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
