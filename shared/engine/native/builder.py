"""The CPU kernels as torch operators: found, or built once per machine.

Built by torch's own extension builder at the first start (some twenty seconds, with a C++ compiler and ninja) and
kept in the cache; without a compiler torch's own operators serve, equal and slower.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shared import logs
from shared.file_lock import exclusive

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "ops.cpp"
# -ffp-contract: products and sums join in one instruction, as the compiler's GNU modes have it by default.
# -fopenmp: torch's parallel loops are templates that are compiled here; without it they run on one thread.
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-Wno-psabi",
)
_COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """The built operators. Stateless; made by `load`.

    Attributes:
        step_attention: One layer's attention of a step.
        decoder_step: A step of a decoder, or a run of its layers.
    """

    step_attention: Callable[..., torch.Tensor]
    decoder_step: Callable[..., torch.Tensor]

    def takes(self, dtype: torch.dtype, head_dim: int) -> bool:
        """True when there is a kernel for the type and the width of a head."""
        return dtype in (torch.float32, torch.bfloat16) and head_dim % 16 == 0 and head_dim <= 256  # noqa: PLR2004 - whole vectors, and step.h's largest sum


def load(folder: Path, *, name: str = "drystone", flags: Sequence[str] = FLAGS) -> NativeKernel | None:
    """The kernels, built into `folder` if they are not there yet; None where they cannot be had, the reason logged.

    Built aside and moved in whole: a build that is killed leaves nothing that another could wait for or load.

    Args:
        folder: Cache of built libraries.
        name: torch's name for the operators: one library of a name is kept for the process.
        flags: Compiler flags.
    """
    log = logs.get("kernel")
    operators = getattr(torch.ops, name)
    if not hasattr(operators, "decoder_step"):
        library = folder / f"{_build_name(name, flags)}.so"
        try:
            if not library.exists():
                _build(library, name, flags)
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call] # torch's own
        except (RuntimeError, OSError) as error:
            log.warning("native_kernel_off", reason=str(error).partition("\n")[0])
            return None
    return NativeKernel(operators.step_attention, operators.decoder_step)


def _build(library: Path, name: str, flags: Sequence[str]) -> None:
    # ninja lies beside this Python, whose environment may not be activated; torch looks for it on PATH.
    before = os.environ.get("PATH", "")
    path = os.pathsep.join([str(Path(sys.executable).parent), before])
    if not (shutil.which("ninja", path=path) and any(shutil.which(c, path=path) for c in _COMPILERS)):
        raise RuntimeError("no C++ compiler or no ninja; the torch path serves")
    from torch.utils.cpp_extension import load as build

    log = logs.get("kernel")
    library.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        undo.enter_context(
            exclusive(library.with_suffix(".lock"), lambda why: log.info("waiting", reason=why), "builds it")
        )
        if library.exists():
            return  # another process has built it meanwhile
        log.info("building_native_kernel", into=str(library))
        os.environ["PATH"] = path
        undo.callback(os.environ.__setitem__, "PATH", before)
        aside = undo.enter_context(tempfile.TemporaryDirectory(dir=library.parent))
        build(
            "drystone_cpu",
            [str(_SOURCE)],
            extra_cflags=[*flags, f"-DDRYSTONE_LIBRARY={name}"],
            is_python_module=False,
            build_directory=aside,
        )
        # torch numbers the file when one process builds twice.
        [built] = Path(aside).glob("*.so")
        built.replace(library)


def _build_name(name: str, flags: Sequence[str]) -> str:
    """Differs whenever sources, flags, torch or the processor do: what was built elsewhere may not run here."""
    processor = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
    supported = next((line for line in processor.splitlines() if line.startswith("flags")), processor)
    sources = [file.read_text() for file in sorted(_FOLDER.glob("*")) if file.suffix in (".cpp", ".h")]
    parts = (*sources, name, *flags, torch.__version__, platform.machine(), supported)
    return f"{name}-" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
