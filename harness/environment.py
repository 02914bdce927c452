"""Where a number came from: versions, processor, accelerator, commit."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "timm", "fvcore", "datasets", "accelerate", "numpy")
SOURCES = ("harness", "reproductions", "leaderboard", "replivit")


class Environment(BaseModel):
    """Machine and software of a measurement. No host or user names are ever kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replivit: str
    python: str
    packages: dict[str, str]
    system: str
    cpu: str
    cpu_count: int
    memory_gib: float
    gpu: str | None = None
    cuda: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    code_sha256: str

    @property
    def machine(self) -> str:
        """What must be equal for two speeds to be comparable (cpu, cores, gpu)."""
        return f"{self.cpu} x{self.cpu_count}" + (f" + {self.gpu}" if self.gpu else "")


def home() -> Path:
    """The place of records and site: `REPLIVIT_HOME`, else the working directory."""
    return Path(os.environ.get("REPLIVIT_HOME") or ".").expanduser()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo(*fields: str) -> str | None:
    """The first of the fields in the system's description of its processors, if it has one."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(fields):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    return (
        _cpuinfo("model name", "hardware")
        or platform.processor()
        or platform.machine()
        or "unknown"
    )


def cpu_vendor() -> str:
    """The processor's maker as it calls itself, e.g. "GenuineIntel" or "AuthenticAMD"."""
    return _cpuinfo("vendor_id") or platform.processor()  # whose last word it is elsewhere


def _memory_gib() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return 0.0


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout this code runs from, or was installed from."""
    if not (ROOT / ".git").exists():
        note = Path(__file__).with_name("_commit.txt")  # left by setup.py in a built package
        words = note.read_text().split() if note.is_file() else []
        return (words[0], "dirty" in words) if words else (None, None)
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None, None
    status = _git("status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


@functools.cache
def code_sha256() -> str:
    """SHA-256 over the project's Python sources: provenance also where git is absent."""
    digest = hashlib.sha256()
    for package in SOURCES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _gpu() -> tuple[str | None, str | None]:
    import torch

    if not torch.cuda.is_available():
        return None, None
    return torch.cuda.get_device_name(0), torch.version.cuda


@functools.cache
def capture() -> Environment:
    """The environment of this process (looked up once)."""
    commit, dirty = _commit()
    gpu, cuda = _gpu()
    return Environment(
        replivit=_version("replivit") or "source",
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := _version(name))},
        system=f"{platform.system()} {platform.release()}",
        cpu=cpu_model(),
        cpu_count=os.cpu_count() or 1,
        memory_gib=_memory_gib(),
        gpu=gpu,
        cuda=cuda,
        commit=commit,
        dirty=dirty,
        code_sha256=code_sha256(),
    )
