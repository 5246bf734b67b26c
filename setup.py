"""Drives CMake (CMakeLists.txt is the build) and puts the libraries into the package.

The environment variables it reads are listed in CONTRIBUTING.md.
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "coup_fast" / "_version.py"))["__version__"]
LOCAL_VERSION = os.environ.get("COUP_FAST_LOCAL_VERSION", "")  # cu130: the wheel is of 0.1.0+cu130
OLD_SETUPTOOLS = int(setuptools.__version__.split(".")[0]) < 77  # cannot read our pyproject.toml
# Tools that pip installed into this environment come first, also when it is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def require_build_tools():
    """End with one sentence unless everything that the build needs is in this environment."""
    missing = ["'setuptools>=77'"] if OLD_SETUPTOOLS else []
    missing += [] if importlib.util.find_spec("torch") else ["'torch>=2.11'"]
    missing += [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]
    if missing:
        raise SystemExit(
            "coup_fast is built against the torch it will run with, in the same environment: run "
            f"`pip install {' '.join(missing)}`, then `pip install --no-build-isolation .`"
        )


class DistInfo(dist_info):
    """The first thing that pip asks for: fail here, before pip downloads any dependency."""

    def run(self):
        require_build_tools()
        super().run()


class CMakeBuild(build_ext):
    """Configure, build and install with CMake; incremental, because build/ is kept."""

    def run(self):
        require_build_tools()
        where = "inplace" if self.inplace else "wheel"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{where}"
        # pybind11 cannot use the limited API: an abi3 wheel leaves the test module out.
        host = os.environ.get("COUP_FAST_HOST", "auto" if self.inplace else "off")
        define = [
            f"-DCOUP_FAST_VERSION={VERSION}",
            f"-DCOUP_FAST_CUDA={os.environ.get('COUP_FAST_CUDA', 'auto')}",
            f"-DCOUP_FAST_HOST={host}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        folder = ROOT / "coup_fast" if self.inplace else Path(self.build_lib) / "coup_fast"
        for command in (
            ["cmake", "--log-level=NOTICE", "-S", ROOT, "-B", build, "-G", "Ninja", *define],
            ["cmake", "--build", build, "-j", os.environ.get("MAX_JOBS", os.cpu_count())],
            ["cmake", "--install", build, "--prefix", folder],
        ):
            if subprocess.call([str(word) for word in command]):
                raise SystemExit(f"coup_fast: {command[0]} failed, its message is above")


if OLD_SETUPTOOLS:
    require_build_tools()
if not re.fullmatch(r"([a-z0-9]+(\.[a-z0-9]+)*)?", LOCAL_VERSION):
    raise SystemExit(
        "COUP_FAST_LOCAL_VERSION must be small letters and digits, parted by dots, such as cu130: "
        f"got {LOCAL_VERSION!r}"
    )
setup(
    # One name stands for all libraries: it tells setuptools that the wheel is not pure Python.
    ext_modules=[Extension("coup_fast._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "dist_info": DistInfo},
    options={
        "bdist_wheel": {"py_limited_api": "cp310"},
        "egg_info": {"tag_build": f"+{LOCAL_VERSION}" if LOCAL_VERSION else ""},
    },
)
