"""Provenance: what is captured, and that nothing personal is."""

from __future__ import annotations

import getpass
import socket
import subprocess

from harness import environment


def test_capture_names_machine_and_versions():
    captured = environment.capture()
    assert captured.cpu_count >= 1
    assert captured.memory_gib > 0
    assert {"torch", "timm", "numpy"} <= set(captured.packages)
    assert captured.cpu in captured.machine
    assert len(captured.code_sha256) == 64


def test_no_host_or_user_name():
    text = environment.capture().model_dump_json()
    assert socket.gethostname() not in text
    assert f'"{getpass.getuser()}"' not in text


def test_commit_of_a_checkout_and_its_dirty_flag(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-m", "one")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    commit, dirty = environment._commit()
    assert len(commit) == 40
    assert dirty is False
    (tmp_path / "a.py").write_text("2\n")
    assert environment._commit() == (commit, True)


def test_commit_noted_in_an_installed_package(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment._commit() == (None, None)
    (tmp_path / "_commit.txt").write_text("abc123 dirty\n")
    assert environment._commit() == ("abc123", True)


def test_home_follows_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLIVIT_HOME", str(tmp_path))
    assert environment.home() == tmp_path
    monkeypatch.delenv("REPLIVIT_HOME")
    assert str(environment.home()) == "."
