"""A folder that ``docker build`` turns into an image that serves one bundle, on the CPU or through CUDA, without torch.

OUT/Dockerfile.cpu  OUT/Dockerfile.cuda  OUT/.dockerignore      as they lie in templates/
OUT/bundle/                                                     the bundle, with its signature if it has one
OUT/wheels/mcdeploy-*.whl                                       mcdeploy itself: it is on no package index yet
OUT/constraints.txt                                             the ONNX Runtime whose parity the bundle proves
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from importlib import resources
from pathlib import Path

from mcruntime.bundle import Bundle
from mcruntime.deploy import Packaged, copy_bundle, new_folder
from mcruntime.errors import InputError, McdeployError
from mcruntime.manifest import SCHEMA_VERSION

TEMPLATES = {"Dockerfile.cpu": "Dockerfile.cpu", "Dockerfile.cuda": "Dockerfile.cuda", "dockerignore": ".dockerignore"}
EXTRAS = {"serve", "grpc", "cpu", "sign"}  # what the Dockerfiles install
NEEDED = ("mcruntime/server/__main__.py", "mcruntime/server/probe.py")  # what they run
ENTRY = '"/srv/bundle"'  # the server's argument in both Dockerfiles
NOT_RUN = "docker was not run here: the images are unbuilt, so build and try them before you rely on them"


def package_docker(bundle: Bundle, out: Path | str, *, wheel: Path | str | None = None) -> Packaged:
    """Write a folder for ``docker build``.

    Args:
        wheel: mcdeploy's own wheel; default: one is built with ``pip wheel``, when mcdeploy runs from a checkout.

    Raises:
        InputError: the model is a TensorRT engine; ``out`` holds something else; no wheel, or not a fitting one.
        McdeployError: the wheel cannot be built.
    """
    if bundle.model.engine is not None:
        raise InputError(
            f"{bundle.folder}: the model {bundle.key!r} is a TensorRT engine, which runs on one kind of GPU only; "
            "package an ONNX model of it, or use --to triton"
        )
    if wheel is not None:
        check_wheel(Path(wheel))
    chosen: dict[str, object] = {"ran_in_docker": False}
    with new_folder(Path(out), "docker", bundle, chosen) as folder:
        (folder / "wheels").mkdir()
        if wheel is not None:
            shutil.copyfile(wheel, folder / "wheels" / Path(wheel).name)
        else:
            check_wheel(build_wheel(find_checkout(), folder / "wheels"))
        chosen["wheel"] = next((folder / "wheels").iterdir()).name
        copy_bundle(bundle, folder / "bundle")
        pinned = _constraints(bundle)
        (folder / "constraints.txt").write_text(pinned, encoding="utf-8")
        for source, target in TEMPLATES.items():
            (folder / target).write_text(_template(source, bundle), encoding="utf-8")
    notes = (
        f"mcdeploy comes from {chosen['wheel']}, ONNX Runtime is {'pinned' if pinned else 'not pinned'}",
        f"next: docker build -f {Path(out) / 'Dockerfile.cpu'} {out}",
        NOT_RUN,
    )
    return Packaged(Path(out), notes)


def find_checkout() -> Path:
    """The folder with mcdeploy's pyproject.toml that this code runs from.

    Raises:
        InputError: mcdeploy runs from an installed wheel.
    """
    root = Path(__file__).resolve().parents[3]
    project = root / "pyproject.toml"
    if not project.is_file() or 'name = "mcdeploy"' not in project.read_text(encoding="utf-8"):
        raise InputError(
            "--to docker: mcdeploy is on no package index yet and does not run from a checkout here; "
            "give its wheel with --wheel FILE ('pip wheel --no-deps CHECKOUT' makes one)"
        )
    return root


def build_wheel(checkout: Path, target: Path) -> Path:
    """Build mcdeploy's wheel into ``target``; pip fetches the build backend for it.

    Raises:
        McdeployError: it cannot be built; with pip's last line.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(checkout)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        said = done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired:
        said = "pip did not end within 10 minutes"
    wheels = list(target.glob("mcdeploy-*.whl"))
    if said or len(wheels) != 1:
        last = (said.strip().splitlines() or ["pip left no wheel"])[-1]
        raise McdeployError(f"{checkout}: building mcdeploy's wheel failed ({last}); give one with --wheel FILE")
    return wheels[0]


def check_wheel(path: Path) -> None:
    """Refuse a file that the Dockerfiles could not install, or whose server could not read the bundle.

    Raises:
        InputError: no such file, not a wheel of mcdeploy, without the extras, or of another bundle schema.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            about = next(name for name in names if name.endswith(".dist-info/METADATA"))
            metadata = HeaderParser().parsestr(archive.read(about).decode("utf-8"))
            schema = re.search(rb"^SCHEMA_VERSION = (\d+)", archive.read("mcruntime/manifest.py"), re.MULTILINE)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; 'pip wheel --no-deps CHECKOUT' makes mcdeploy's wheel") from None
    except (OSError, zipfile.BadZipFile, StopIteration, KeyError, UnicodeDecodeError):
        raise InputError(f"{path}: is no wheel of mcdeploy; 'pip wheel --no-deps CHECKOUT' makes one") from None
    missing = EXTRAS - set(metadata.get_all("Provides-Extra") or [])
    if metadata["Name"] != "mcdeploy" or not path.match("mcdeploy-*.whl") or not set(NEEDED) <= set(names):
        raise InputError(f"{path}: is no wheel of mcdeploy; 'pip wheel --no-deps CHECKOUT' makes one")
    if missing:
        raise InputError(f"{path}: has no extra {', '.join(sorted(missing))}; build the wheel of a newer mcdeploy")
    if schema is None or int(schema[1]) != SCHEMA_VERSION:
        raise InputError(
            f"{path}: reads bundles of schema {schema[1].decode() if schema else 'unknown'}, this one has "
            f"{SCHEMA_VERSION}; build the wheel of the mcdeploy that made the bundle"
        )


def _template(name: str, bundle: Bundle) -> str:
    text = resources.files("mcruntime.deploy").joinpath("templates", name).read_text(encoding="utf-8")
    if bundle.key != bundle.manifest.serve:
        text = text.replace(ENTRY, f'"/srv/bundle@{bundle.key}"')
    return text


def _constraints(bundle: Bundle) -> str:
    """The engine of the parity checks, by both of its names: only the one that is installed counts."""
    version = bundle.manifest.versions.get("onnxruntime") or bundle.manifest.versions.get("onnxruntime-gpu")
    return f"onnxruntime=={version}\nonnxruntime-gpu=={version}\n" if version else ""
