"""The texts of a repository, from the templates beside this file."""

from pathlib import Path
from typing import Any

from google.protobuf.text_encoding import CEscape
from jinja2 import Environment, PackageLoader, StrictUndefined

from treeq_export import __version__
from treeq_export.serve.served import SAMPLER, Served


def _quote(text: object) -> str:
    """Return a text as protobuf's text format writes it, quotes included."""
    return f'"{CEscape(str(text).encode(), as_utf8=True)}"'


def render(template: str, served: Served, **values: Any) -> str:
    """Return the text of a file.

    Args:
        template: Name of the template, without .j2.
        served: The repository.
        values: Further variables of the template.
    """
    environment = Environment(
        loader=PackageLoader("treeq_export.serve"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quoted"] = _quote
    return environment.get_template(f"{template}.j2").render(
        served=served,
        options=served.options,
        settings=served.settings,
        graph=served.graph,
        engine=served.engine,
        backend=served.options.chosen_backend,
        library=served.settings.network.library,
        version=__version__,
        **values,
    )


def render_configs(served: Served, root: Path) -> dict[str, str]:
    """Return every config.pbtxt and configs/cpu.pbtxt by its name in the repository.

    Args:
        served: The repository.
        root: The repository's place on the server.
    """
    texts = {}
    for model in served.models:
        alone = model == SAMPLER and served.options.mode != "inprocess"  # it calls what has the GPU
        own = "KIND_CPU" if served.engine is None or alone else "KIND_GPU"
        for name, kind in (("config.pbtxt", own), ("configs/cpu.pbtxt", "KIND_CPU")):
            texts[f"{model}/{name}"] = render(f"{model}.pbtxt", served, root=root, kind=kind)
    return texts
