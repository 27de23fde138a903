"""`treeq-export serve`: a Triton model repository of a run."""

from pathlib import Path
from typing import Any

import click

from treeq_export.cli.console import json_option, main, run_option, say, stage_progress
from treeq_export.targets.names import ENGINES, GRAPHS, ORT

_FOLDER = click.Path(path_type=Path)


@main.command()
@run_option
@click.option("--out", type=_FOLDER, help="Folder of the repository  [default: DIR/triton]")
@click.option(
    "--target",
    type=click.Choice([*GRAPHS, *ENGINES]),
    default=ORT,
    show_default=True,
    help="Compiled graph to serve, or the engine that was built from it.",
)
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt", "python"]),
    help="Triton backend of the model `denoiser`  [default: the target's own]",
)
@click.option(
    "--mode",
    type=click.Choice(["inprocess", "bls"]),
    default="inprocess",
    show_default=True,
    help="inprocess: the sampler runs the denoiser itself; "
    "bls: the sampler calls the model `denoiser` at each step.",
)
@click.option(
    "--runtime",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    default="tensorrt",
    show_default=True,
    help="Runtime that the engine was built with.",
)
@click.option(
    "--gpu", metavar="SM", help="GPU architecture (sm_89 ...), if there are several engines."
)
@click.option(
    "--root", type=_FOLDER, help="Path of the repository on the server  [default: the path here]"
)
@click.option(
    "--max-batch",
    type=int,
    help="Most rows in one call  [default: 16, or fewer if the target takes fewer]",
)
@click.option(
    "--dynamic-batching/--no-dynamic-batching",
    default=True,
    show_default=True,
    help="Let the server merge requests into one call.",
)
@click.option(
    "--queue-delay-us",
    default=100,
    show_default=True,
    help="Microseconds that a request waits to be merged with others.",
)
@click.option(
    "--instances", default=1, show_default=True, help="Number of processes that run the denoiser."
)
@click.option(
    "--concurrency",
    default=16,
    show_default=True,
    help="Most requests in progress at a time in mode bls.",
)
@click.option("--threads", type=int, help="Threads inside an operator of ONNX Runtime.")
@click.option("--decoupled", is_flag=True, help="Stream previews of each step; gRPC only.")
@click.option("--vae", type=_FOLDER, help="Folder of a diffusers AutoencoderKL.")
@click.option(
    "--plugin-library", type=_FOLDER, help="Path of libtreeq_plugins.so, if it is not installed."
)
@click.option("--add-version", is_flag=True, help="Add the next version to a repository.")
@json_option
def serve(run: Path, out: Path | None, as_json: bool, **options: Any) -> None:
    """Write a Triton model repository, and lint it."""
    from treeq_export.model.checkpoint import build_model
    from treeq_export.model.conditioning import make_denoiser
    from treeq_export.pipeline.run import require_results
    from treeq_export.pipeline.workspace import Workspace
    from treeq_export.serve.options import ServeOptions
    from treeq_export.serve.stage import run_serve

    chosen = ServeOptions(**options)
    chosen.check()
    elsewhere = out is not None and not out.resolve().is_relative_to(run.resolve())
    with (
        Workspace.reopen(run, read_only=elsewhere) as workspace,
        stage_progress() as progress,
    ):
        on_step = progress.start("serve", False)
        require_results(workspace, "serve", ("compile",))
        compiled = workspace.stages["compile"].outputs
        checkpoint, recipe = workspace.checkpoint, workspace.recipe
        denoiser = make_denoiser(build_model(checkpoint), checkpoint, recipe.model)
        written = run_serve(
            run, denoiser, recipe, chosen, out=out, compiled=compiled, on_step=on_step
        )
    if as_json:
        click.echo(written.manifest.model_dump_json(indent=2))
        return
    say(f"wrote {written.root}, version {written.version}: {', '.join(written.served.models)}")
    if written.manifest.root is not None:
        say(
            f"It runs at {written.manifest.root} only: its configuration names the library of our "
            "operators there. Write it with --root PLACE for another place."
        )
    click.echo(written.root / "launch.sh")
