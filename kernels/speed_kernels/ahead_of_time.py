"""What a Triton kernel becomes on a given GPU, found on a machine without one.

Triton's wheel carries NVIDIA's assembler and disassembler, so a kernel can be compiled for A100 (80), H100/H200 (90)
and B200 (100) anywhere. `report` does that and reads the machine code: registers, stack, spills, shared memory and the
widths of its global loads and stores. Tests hold kernels to these figures; only speed needs the device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200

_RESOURCES = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")
# One machine instruction: optional predicate, then the dotted operation.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_WIDTH = re.compile(r"\.(?:[US]?(8|16)|(64|128|256))\b")


@dataclass(frozen=True)
class Report:
    """One kernel compiled for one architecture. Registers and stack are a thread's, shared memory a program's."""

    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    spills: int  # instructions that touch local memory
    shared_bytes: int
    loads: Mapping[int, int] = field(
        default_factory=dict
    )  # width in bits -> global load instructions
    stores: Mapping[int, int] = field(
        default_factory=dict
    )  # width in bits -> global store instructions
    num_instructions: int = 0
    ptx: str = field(default="", repr=False)
    sass: str = field(default="", repr=False)

    @property
    def load_bits(self) -> int:
        """Width of the widest global load."""
        return max(self.loads, default=0)

    @property
    def store_bits(self) -> int:
        """Width of the widest global store."""
        return max(self.stores, default=0)


def unavailable() -> str | None:
    """Why kernels cannot be compiled and read here, or None."""
    try:
        import triton  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if not _disassembler().exists():
        return f"this triton has no {_disassembler()}"
    return None


def report(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    max_registers: int | None = None,
    divisible: Collection[str] = (),
) -> Report:
    """Compile `kernel` (a `@triton.jit` function) for `arch` (80, 90, 100) and describe the machine code.

    `signature` gives the type of every argument that is not constexpr ("*fp32", "*bf16", "i32", "i64", "fp32"), and
    `constexprs` the value of every one that is. Pointers are taken as 16-byte aligned and the integers named in
    `divisible` as multiples of 16, as the launcher finds them for ordinary tensors. Raises ValueError where an argument
    has neither a type nor a value, or under TRITON_INTERPRET=1.
    """
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    if not isinstance(kernel, triton.runtime.JITFunction):
        raise ValueError(
            f"{kernel!r} is no compiled Triton kernel; unset TRITON_INTERPRET before importing it"
        )
    missing = [
        name for name in kernel.arg_names if name not in signature and name not in constexprs
    ]
    if missing:
        raise ValueError(
            f"give {kernel.__name__}'s arguments {', '.join(missing)} a type or a value"
        )
    types = {
        name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names
    }
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, type_name) in enumerate(types.items())
        if type_name.startswith("*") or name in divisible
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": max_registers}
    options["enable_fp_fusion"] = True
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = _disassemble(binary.asm["cubin"])
    found = _RESOURCES.search(usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage}")
    instructions = _INSTRUCTION.findall(sass)
    operations = [name.split(".")[0] for name in instructions]
    return Report(
        kernel=kernel.__name__,
        arch=arch,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        spills=sum(name in ("LDL", "STL") for name in operations),
        shared_bytes=binary.metadata.shared,
        loads=_widths(instructions, "LDG"),
        stores=_widths(instructions, "STG"),
        num_instructions=len(instructions),
        ptx=binary.asm["ptx"],
        sass=sass,
    )


def _widths(instructions: list[str], operation: str) -> dict[int, int]:
    """How many instructions of `operation` move how many bits each: the suffix tells, 32 where there is none."""
    counts: Counter[int] = Counter()
    for name in instructions:
        if name.split(".")[0] == operation:
            width = _WIDTH.search(name.replace(".E", "", 1))
            counts[int(width[1] or width[2]) if width else 32] += 1
    return dict(counts)


def _disassembler() -> Path:
    import triton  # pyright: ignore[reportMissingImports]

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of a binary, as cuobjdump prints them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, sass = (
            subprocess.run(
                [str(_disassembler()), option, str(file)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    return usage, sass
