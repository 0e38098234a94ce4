"""Build of the native extension `leafkern._C`, one object per instruction set.

Everything else about the package stands in pyproject.toml. A missing compiler never fails the install: the
package then runs on the PyTorch reference, and `leafkern doctor` says what is slower.

LEAFKERN_NATIVE=0 skips the extension; LEAFKERN_CXXFLAGS adds compiler flags (sanitizers).
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import find_packages, setup

try:
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ImportError:
    Pybind11Extension = None

X86 = platform.machine().lower() in ("x86_64", "amd64")
POSIX = os.name == "posix"
# Per-file flags: code of one instruction set lives in its own object and its own namespace.
ISA_FLAGS = {"cpu_avx2.cpp": ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt"] if POSIX else ["/arch:AVX2"]}


def native_extensions():
    if Pybind11Extension is None or os.environ.get("LEAFKERN_NATIVE") == "0":
        return []
    sources = [path.as_posix() for path in sorted(Path("csrc").rglob("*.cpp"))]
    if not X86:
        sources = [source for source in sources if not source.endswith("cpu_avx2.cpp")]
    headers = [path.as_posix() for pattern in ("*.h", "*.inl") for path in sorted(Path("csrc").rglob(pattern))]
    # Without errno and floating-point traps compilers vectorise more loops; no result depends on either.
    flags = ["-O3", "-g0", "-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math"] if POSIX else ["/O2"]
    return [
        Pybind11Extension(
            "leafkern._C",
            sources,
            depends=headers,
            include_dirs=["csrc"],
            cxx_std=17,
            define_macros=[("LEAFKERN_X86", "1" if X86 else "0")],
            extra_compile_args=flags + os.environ.get("LEAFKERN_CXXFLAGS", "").split(),
            extra_link_args=(["-pthread"] if POSIX else []) + os.environ.get("LEAFKERN_CXXFLAGS", "").split(),
        )
    ]


def optional_build_ext():
    class OptionalBuildExt(build_ext):
        def build_extension(self, ext):
            compile_objects = self.compiler.compile

            def compile_each(sources, **options):
                # The base class has one flag list for all sources; each instruction set needs its own.
                postargs = options.pop("extra_postargs", None) or []
                return [
                    compiled
                    for source in sources
                    for compiled in compile_objects(
                        [source], extra_postargs=postargs + ISA_FLAGS.get(Path(source).name, []), **options
                    )
                ]

            self.compiler.compile = compile_each
            try:
                super().build_extension(ext)
            except Exception as error:
                if os.environ.get("LEAFKERN_NATIVE") == "1":
                    raise
                ext.optional = True  # an editable install then does not miss the file
                print(f"leafkern: native kernels not built ({error}); the PyTorch reference serves", file=sys.stderr)
            finally:
                self.compiler.compile = compile_objects

    return OptionalBuildExt


extensions = native_extensions()
setup(
    packages=[*find_packages(include=["leafkern", "leafkern.*"]), "leafkern.bench"],
    package_dir={"leafkern.bench": "bench"},
    package_data={"leafkern.bench": ["*.cpp"]},
    ext_modules=extensions,
    cmdclass={"build_ext": optional_build_ext()} if extensions else {},
)
