"""Fixtures that several files share: the TensorRT plugins, built once a process and TensorRT."""

from pathlib import Path

import pytest

from tests.kernels.plugin_build import Built, build_all, header_roots, make_cubins, require_headers


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what builds the plugins, which takes a minute where TensorRT's headers are."""
    for item in items:
        if "built" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of `python -m treeq_gpu.ahead`, of texts instead of machine code."""
    return make_cubins(tmp_path_factory.mktemp("kernels") / "cubins")


@pytest.fixture(scope="session", params=header_roots())
def built(
    request: pytest.FixtureRequest, cubins: Path, tmp_path_factory: pytest.TempPathFactory
) -> Built:
    """The library, built with each TensorRT's headers."""
    root = require_headers(request.param)
    return build_all(root, cubins, tmp_path_factory.mktemp("plugins"))
