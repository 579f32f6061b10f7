"""Folders of checkpoints, and small disks."""

import shutil
import subprocess

import pytest

from tests.faults import corruptions, kills


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Two steps that were saved; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    corruptions.original(folder)
    return folder


@pytest.fixture
def run_folder(saved, tmp_path):
    """A copy of `saved`."""
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture(scope="session")
def server():
    """Starts processes to be killed."""
    return kills.server()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
