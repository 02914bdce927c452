"""Everything is declared in pyproject.toml; this only notes the commit inside a built package."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithCommit(build_py):
    """Leaves `harness/_commit.txt` (commit, and "dirty" if sources differ) in the built package."""

    def run(self):
        super().run()
        if not (Path(__file__).parent / ".git").exists():
            return  # an unpacked archive: a repository around it is another project's
        git = ["git", "-C", str(Path(__file__).parent)]
        try:
            commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
            changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
        except (OSError, subprocess.CalledProcessError):
            return
        target = Path(self.build_lib) / "harness"
        if target.is_dir() and not self.editable_mode:
            (target / "_commit.txt").write_text(f"{commit}{' dirty' if changed.strip() else ''}\n")


setup(cmdclass={"build_py": BuildWithCommit})
