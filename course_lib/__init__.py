"""Helper library of the course. Importing it loads nothing heavy; what lessons call is loaded at its first use."""

import logging
from importlib import import_module

LAZY = {
    "start": "profiles",
    "record": "results",
    "finish": "results",
    "check": "exercises",
    "show_source": "exercises",
}
__all__ = ["CourseError", *LAZY]

# bitsandbytes looks for a faster kernel of the hub while it is imported (which PEFT does for any adapter) and warns
# that it has none. The kernel serves repacked 4-bit weights alone, which `guards.keep_unpacked` rules out.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda entry: "gemm_4bit_forward from kernels-community" not in entry.getMessage()
)


class CourseError(Exception):
    """A foreseeable fault. Its message says what was wrong, with which value, and what to do."""


def __getattr__(name):
    if name in LAZY:
        return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *LAZY])
