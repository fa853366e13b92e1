"""The compiled CPU kernels, an optional part: without a C++ compiler the package installs as well.

Everything else is in setup.cfg. The extension is plain C++ that ctypes loads; it knows nothing of
Python, so one build serves every version.
"""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[Extension(
        "mpicomp.kernels.cpu._cpu",
        ["mpicomp/kernels/cpu/src/cpu.cpp"],
        depends=sorted(glob("mpicomp/kernels/cpu/src/*.h")),
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno",
                            "-fvisibility=hidden", "-pthread"],
        extra_link_args=["-pthread"],
        language="c++",
        optional=True,
        py_limited_api=True,
    )],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
