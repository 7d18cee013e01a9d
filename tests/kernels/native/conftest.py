"""The built kernels, in every form that this machine can run."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence

import pytest

from shared.engine.native import builder
from shared.engine.native.builder import FLAGS, NativeKernel
from shared.model.catalog import cache_dir

# What a machine without AVX-512 compiles: the compiler's own vectors in AVX2, bfloat16 widened. Little optimised: it is
# built for its results.
_OTHER = {"-march=native": "-march=x86-64-v3", "-O3": "-O1"}
_PLAIN = (*(_OTHER.get(flag, flag) for flag in FLAGS), "-DDRYSTONE_PLAIN")


@pytest.fixture(scope="session")
def kernel() -> NativeKernel:
    """The kernel of this machine, from the cache when it was built before."""
    return _load("drystone", FLAGS)


@pytest.fixture(scope="session", params=["this machine", "plain"])
def any_kernel(request: pytest.FixtureRequest) -> NativeKernel:
    """Every form of the kernel."""
    if request.param == "this machine":
        return request.getfixturevalue("kernel")
    if platform.machine() != "x86_64":
        pytest.skip("the plain form is built for x86-64")
    return _load("drystone_plain", _PLAIN)


def _load(name: str, flags: Sequence[str]) -> NativeKernel:
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("needs a C++ compiler")
    made = builder.load(cache_dir() / "kernels", name=name, flags=flags)
    assert made is not None, "a machine with a compiler builds the kernels"
    return made
