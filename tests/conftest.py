"""Where the recorded numbers of the original are, and which tests a set of them calls for."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

# Kernels run in Triton's interpreter, which looks when they are defined: before any test module is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

DEFAULT_GOLDEN = Path(__file__).parent / "parity" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=DEFAULT_GOLDEN,
        metavar="DIR",
        help="recorded numbers of the original: a folder with fixtures/ and manifests/ inside, or with their files",
    )

    parser.addoption(
        "--kernels",
        choices=("auto", "triton"),
        default="auto",
        help="triton: parity of the forward and backward with every kernel on, in fp32 (in the interpreter: minutes)",
    )
    parser.addoption(
        "--repeats", type=int, default=250, metavar="N", help="on a GPU: runs that must give the same bits; 250"
    )
    parser.addoption("--slow", action="store_true", help="also what takes minutes a test")
    parser.addoption("--brief", action="store_true", help="leave out what is marked `long`")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes; runs with --slow only")
    config.addinivalue_line("markers", "long: many seconds of what has shorter tests too; left out with --brief")
    config.addinivalue_line("markers", "gpu: needs a GPU, and TRITON_INTERPRET=0")
    config.addinivalue_line(
        "markers",
        "golden(pattern, without=()): runs once per file of --golden that matches, as `golden_file` where the test "
        "takes it; left out where there is none",
    )
    folder = config.getoption("golden")
    if not folder.is_dir():
        raise pytest.UsageError(
            f"--golden {folder}: no such folder; want one in the format of tests/parity/golden/README.md"
        )


def golden_folders(config: pytest.Config) -> tuple[Path, Path]:
    """(folder of fixtures, folder of manifests)."""
    root: Path = config.getoption("golden")
    fixtures, manifests = root / "fixtures", root / "manifests"
    return (fixtures if fixtures.is_dir() else root), (manifests if manifests.is_dir() else root)


def golden_files(config: pytest.Config, mark: pytest.Mark) -> list[Path]:
    (pattern,) = mark.args
    left_out = mark.kwargs.get("without", ())
    folders = {*golden_folders(config), config.getoption("golden")}
    files = {file for folder in folders for file in folder.glob(pattern)}
    return sorted(file for file in files if file.stem not in left_out)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("golden")
    if mark is not None and "golden_file" in metafunc.fixturenames:
        files = golden_files(metafunc.config, mark) or [None]
        metafunc.parametrize("golden_file", files, ids=lambda file: file.stem if file else "none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of files that this set does not have: nothing is skipped that could run."""
    marked = [(item, item.get_closest_marker("golden")) for item in items]
    left_out = [item for item, mark in marked if mark is not None and not golden_files(config, mark)]
    if not config.getoption("slow"):
        left_out += [item for item in items if item.get_closest_marker("slow")]
    if config.getoption("brief"):
        left_out += [item for item in items if item.get_closest_marker("long")]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not gpu_is_there():
        left_out += on_gpu
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def gpu_is_there() -> bool:
    """Whether kernels are compiled and run on a GPU."""
    import torch  # takes a second, which most runs of a few tests need not spend

    return torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0"


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> str:
    """The value of --kernels."""
    return request.config.getoption("kernels")


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of the fixture files."""
    return golden_folders(request.config)[0]


@pytest.fixture(scope="session")
def golden_root(request: pytest.FixtureRequest) -> Path:
    """The folder given: fixtures of fine-tuning are in its finetune/, patterns of the mark may begin so."""
    return request.config.getoption("golden")


@pytest.fixture(scope="session")
def golden_manifests(request: pytest.FixtureRequest) -> Path:
    """The folder of the manifests."""
    return golden_folders(request.config)[1]


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """Of an S3 service on this machine, one for all tests of a process."""
    from ofa_ds.bench.s3_server import s3_server

    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(s3_address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Location of a new bucket there, with the environment that reaches it and a cache of its own."""
    from ofa_ds.bench.s3_server import make_bucket, settings

    for name, value in settings(s3_address).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OFA_DS_CACHE", str(tmp_path / "cache"))
    return make_bucket(s3_address, f"b{secrets.token_hex(6)}")
