"""The wheel holds what the clone holds: lipprep is built, installed elsewhere and used from there."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PYPROJECT["tool"]["setuptools"]["package-dir"]  # package -> folder
# What only an extra installs: a module that needs one may fail to import, for want of it alone.
OPTIONAL = {"dask", "distributed", "dlib", "face_recognition_models", "ray"}
# Slow to import: a command's help must not wait for them.
SLOW = {"torch", "cv2", "webdataset", "matplotlib", "face_alignment", "skimage", "tensorboard"}

IMPORT_ALL = """
import hashlib, importlib, json, sys
from importlib import resources

modules, data, optional = json.load(sys.stdin)
files, missing = {}, {}
for name in modules:
    try:
        files[name] = importlib.import_module(name).__file__
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in optional:
            raise
        missing[name] = error.name
read = {
    f"{package}/{path}": hashlib.sha256((resources.files(package) / path).read_bytes()).hexdigest()
    for package, path in data
}
json.dump([files, missing, read], sys.stdout)
"""


def source_files() -> list[tuple[str, Path]]:
    """Each file of the code folders: the package that its folder is, and its path below that folder."""
    return [
        (package, path.relative_to(ROOT / folder))
        for package, folder in FOLDERS.items()
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    ]


def module_name(package: str, path: Path) -> str:
    parts = [package, *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python(installed: Path, cwd: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    """Run Python with the installed wheel before everything else, the clone's editable install included."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed)},
        input=stdin,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution of a copy: a build leaves files in its folder."""
    folder = tmp_path_factory.mktemp("build")
    project = PYPROJECT["project"]
    for name in ["pyproject.toml", project["readme"], *project["license-files"]]:
        shutil.copy(ROOT / name, folder / name)
    for name in FOLDERS.values():
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in, without a network."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    done = subprocess.run([*pip, "--target", str(target), str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def test_every_package_folder_is_listed() -> None:
    # An editable install finds a subpackage that is not listed; the wheel would be without it.
    code = [(package, path) for package, path in source_files() if path.suffix == ".py"]
    folders = {module_name(package, path.parent / "__init__") for package, path in code}
    assert folders == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_wheel_puts_nothing_but_lipprep_at_top_level(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top = {name.partition("/")[0] for name in archive.namelist()}
    version = wheel.name.split("-")[1]
    assert top == {"lipprep", f"lipprep-{version}.dist-info"}


def test_wheel_holds_the_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name for name in archive.namelist() if ".dist-info/licenses/" in name}
    assert names == {"LICENSE", "LICENSE-APACHE-2.0", "NOTICE"}


def test_every_module_and_data_file_works_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    modules = [module_name(package, path) for package, path in source_files() if path.suffix == ".py"]
    data = [(package, path) for package, path in source_files() if path.suffix != ".py"]
    stdin = json.dumps([modules, [(package, path.as_posix()) for package, path in data], sorted(OPTIONAL)])
    done = python(installed, tmp_path, "-c", IMPORT_ALL, stdin=stdin)
    assert done.returncode == 0, done.stderr
    files, missing, read = json.loads(done.stdout)
    assert set(files) | set(missing) == set(modules)
    elsewhere = {name: file for name, file in files.items() if not Path(file).is_relative_to(installed)}
    assert not elsewhere, "imported from the clone, not from the wheel"
    sources = {f"{package}/{path.as_posix()}": ROOT / FOLDERS[package] / path for package, path in data}
    assert read == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sources.items()}


@pytest.mark.parametrize(
    "command",
    [["lipprep", "--help"], ["lipprep", "landmarks", "--help"], ["lipprep", "train", "--help"]],
    ids=" ".join,
)
def test_help_imports_nothing_slow(command: list[str], installed: Path, tmp_path: Path) -> None:
    done = python(installed, tmp_path, "-X", "importtime", "-m", *command)
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    assert "Usage: " in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & SLOW


def test_each_requirement_has_a_tested_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {line.partition("==")[0] for line in lines if "==" in line}
    project = PYPROJECT["project"]
    required = [project["dependencies"], *project["optional-dependencies"].values()]
    named = {requirement.partition(">=")[0] for group in required for requirement in group}
    assert {name for name in named if not name.startswith("lipprep[")} <= tested
