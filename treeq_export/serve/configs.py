"""The texts of a repository, from the templates beside this file."""

from pathlib import Path
from typing import Any

from google.protobuf.text_encoding import CEscape
from jinja2 import Environment, PackageLoader, StrictUndefined

from treeq_export import __version__
from treeq_export.serve.served import DENOISER, SAMPLER, VAE_DECODER, Served

_CPU, _GPU = "KIND_CPU", "KIND_GPU"


def _quote(text: object) -> str:
    """Return a text as protobuf's text format writes it, quotes included."""
    return f'"{CEscape(str(text).encode(), as_utf8=True)}"'


def _render(template: str, served: Served, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("treeq_export.serve"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quoted"] = _quote
    common = {
        "served": served,
        "options": served.options,
        "settings": served.settings,
        "graph": served.graph,
        "engine": served.engine,
        "backend": served.options.chosen_backend,
        "library": served.settings.network.library,
        "version": __version__,
    }
    return environment.get_template(template).render(common | values)


def render_configs(served: Served, root: Path) -> dict[str, str]:
    """Return every config.pbtxt and configs/cpu.pbtxt by its name in the repository.

    Args:
        served: What is served.
        root: Path of the repository on the server.
    """
    gpu = _CPU if served.engine is None else _GPU
    kinds = {
        DENOISER: gpu,
        SAMPLER: gpu if served.options.mode == "inprocess" else _CPU,
        VAE_DECODER: gpu,
    }
    texts = {}
    for model in served.models:
        for name, kind in (("config.pbtxt", kinds[model]), ("configs/cpu.pbtxt", _CPU)):
            text = _render(f"{model}.pbtxt.j2", served, root=root, kind=kind)
            texts[f"{model}/{name}"] = text
    return texts


def render_launch(served: Served) -> str:
    """Return launch.sh."""
    plugin = served.settings.network.library if served.engine is not None else None
    return _render("launch.sh.j2", served, models=served.loaded, plugin=plugin)


def render_model(served: Served, model: str) -> str:
    """Return model.py of a model that the Python backend runs."""
    return _render("model.py.j2", served, model=model)


def render_readme(served: Served, packages: dict[str, dict[str, str]]) -> str:
    """Return the operator's README.md.

    Args:
        served: What is served.
        packages: Python packages by model.
    """
    merged = {name: version for model in packages.values() for name, version in model.items()}
    return _render("README.md.j2", served, packages=merged)
