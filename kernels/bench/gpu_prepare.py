"""Get ready, on a machine without a GPU, what one without a network cannot download.

    python kernels/bench/gpu_prepare.py [--run RUN]

fills folders of the repository that git is told to ignore, each below the size of one transfer:

    .whl/       wheels of the packages that the GPU machine does not have
    .rtx/0 1    halves of TensorRT-RTX's library, compressed, and its Python modules
    .rtx/engines/<target>-<gpu>/    engines of RUN, with an input and what ONNX Runtime makes of it

Engines are those that `treeq-export build --run RUN --runtime tensorrt-rtx --gpu sm_80,...` made.
"""

import argparse
import lzma
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHEELS, RTX = ".whl", ".rtx"
PYTHON_THERE = "3.12"
# What the GPU machine may lack, with what these need.
PACKAGES = (
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    *("click", "diffusers", "importlib-metadata", "tensorrt-rtx-cu13-bindings"),
)
PLATFORMS = ("2_31", "2_28", "2_27", "2_17")
LIBRARY = "libtensorrt_rtx.so.1"
NUM_PARTS = 2
_BLOCK = 1 << 24


def download_command(out: Path) -> list[str]:
    """Return the command that fetches the wheels, in the versions that are installed here."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", PYTHON_THERE, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", f"manylinux_{platform}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", "--dest", str(out)]
    return command + [f"{name}=={version(name)}" for name in PACKAGES]


def ignore(root: Path, names: Sequence[str]) -> None:
    """Tell git to ignore folders of this checkout, so that they travel only when named."""
    path = root / ".git" / "info" / "exclude"
    lines = path.read_text().splitlines() if path.is_file() else []
    missing = [f"/{name}/" for name in names if f"/{name}/" not in lines]
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, *missing]) + "\n")


def split(data: bytes, folders: Sequence[Path], name: str) -> None:
    """Write equal parts of `data`, one a folder, as <name>.<number>."""
    size = -(-len(data) // len(folders))
    for index, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.{index}").write_bytes(data[index * size : (index + 1) * size])


def compress(source: Path) -> bytes:
    """Return a file by xz; the library of TensorRT-RTX takes about five minutes of one core."""
    compressor = lzma.LZMACompressor(preset=6)
    parts = []
    with source.open("rb") as file:
        while block := file.read(_BLOCK):
            parts.append(compressor.compress(block))
    return b"".join([*parts, compressor.flush()])


def prepare_rtx(out: Path) -> None:
    """Put TensorRT-RTX's library and modules into `out`, unless they are there."""
    import tensorrt_rtx
    import tensorrt_rtx_libs

    folders = [out / str(index) for index in range(NUM_PARTS)]
    name = f"{LIBRARY}.xz"
    if not all((folder / f"{name}.{i}").is_file() for i, folder in enumerate(folders)):
        sys.stderr.write("compressing TensorRT-RTX's library, which takes minutes\n")
        split(compress(Path(tensorrt_rtx_libs.__file__).parent / LIBRARY), folders, name)
    for module in (tensorrt_rtx, tensorrt_rtx_libs):
        source = Path(module.__file__ or "").parent
        target = folders[0] / source.name
        target.mkdir(exist_ok=True)
        shutil.copy2(source / "__init__.py", target)


def prepare_engines(run: Path, out: Path) -> list[Path]:
    """Copy a run's engines, each with an input and the compiled graph's output on the CPU."""
    from gpu_rtx import EXPECTED, INPUTS
    from safetensors.numpy import save_file

    from treeq_export.runners.compiled import open_target
    from treeq_export.workspace import Workspace

    copied = []
    with Workspace.reopen(run) as workspace:
        example = workspace.denoiser.make_example_inputs(2, seed=0)
        inputs = {name: value.numpy() for name, value in example.items()}
        for manifest in sorted((run / "engines" / "tensorrt-rtx").glob("*/*/manifest.json")):
            target, gpu = manifest.parts[-3:-1]
            folder = out / f"{target}-{gpu}"
            shutil.copytree(manifest.parent, folder, dirs_exist_ok=True)
            with open_target(run, target) as runner:
                output = runner.run(inputs)
            save_file(inputs, folder / INPUTS)
            save_file({"output": output.astype("float32")}, folder / EXPECTED)
            copied.append(folder)
    return copied


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="run folder with TensorRT-RTX engines")
    arguments = parser.parse_args(argv)
    ignore(ROOT, (WHEELS, RTX))
    wheels = ROOT / WHEELS
    shutil.rmtree(wheels, ignore_errors=True)  # two versions of one package stop the install
    subprocess.run(download_command(wheels), check=True)
    prepare_rtx(ROOT / RTX)
    if arguments.run is not None:
        for folder in prepare_engines(arguments.run, ROOT / RTX / "engines"):
            sys.stdout.write(f"{folder.relative_to(ROOT)}\n")
    for path in (wheels, *sorted((ROOT / RTX).iterdir())):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        sys.stdout.write(f"{path.relative_to(ROOT)}: {size / 2**20:.1f} MiB\n")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
