"""What a kernel that Triton compiled needs of a GPU, read from its code: there is no driver to ask."""

import functools
import re
import subprocess
import tempfile
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "FFMA", "LDL", "STL", "LDGSTS")
IN_PTX = {"HMMA": "mma.sync", "HGMMA": "wgmma.mma_async", "UTCHMMA": "tcgen05.mma"}  # what ptxas makes each of


def tool(name: str, *options: str, cubin: bytes) -> str:
    """Semantics: what one of CUDA's tools prints about machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        done = subprocess.run([TOOLS / name, *options, f.name], capture_output=True, text=True)
    if not done.stdout:
        raise RuntimeError(f"{name} says nothing: {done.stderr}")
    return done.stdout


@functools.cache  # several calls launch the same kernel, and the disassembler takes longer than compiling a small one
def disassembled(cubin: bytes) -> dict:
    """Semantics: {instruction: how often it stands in the machine code}."""
    sass = tool("nvdisasm", "-c", "--no-dataflow", cubin=cubin)
    return {name: len(re.findall(rf"\b{name}\b", sass)) for name in INSTRUCTIONS}


def refilled(ttgir: str, stages: int) -> int:
    """Semantics: how many asynchronous dots may still read a buffer when the loop's copy of a later tile arrives there:
    dots of a loop's own buffers, fewer than the stages, that are not waited for at once. The numbers come out wrong.
    """
    buffers, origin, reads, found = {}, {}, {}, 0
    for line in ttgir.splitlines():  # in order: a loop's names are used again in the next one
        if m := re.search(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", line):
            buffers[m[1]] = int(m[2])
        elif m := re.search(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", line):
            origin[m[1]] = origin.get(m[2], m[2])
        elif m := re.search(r"(%\w+) = ttng\.warp_group_dot (%\w+), (%\w+)", line):
            reads[m[1]] = sum(buffers.get(origin.get(operand), stages) < stages for operand in m.groups()[1:])
        elif m := re.search(r"warp_group_dot_wait ([^{]*) \{pendings = (\d+)", line):
            found += sum(reads.pop(name, 0) for name in m[1].split(", ") if int(m[2]))
    return found


def resources(compiled, disassemble: bool) -> dict:
    """Registers, stack, local and shared memory, instruction counts: read from the code (no driver to ask)."""
    found = re.findall(
        r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "--dump-resource-usage", cubin=compiled.asm["cubin"])
    )
    found = {name: int(number) for name, number in found}
    if disassemble:
        counts = disassembled(compiled.asm["cubin"])
    else:
        counts = {name: len(re.findall(rf"\s{re.escape(text)}", compiled.asm["ptx"])) for name, text in IN_PTX.items()}
    return dict(
        registers=found["REG"],
        stack=found["STACK"],
        local=found["LOCAL"],
        shared=compiled.metadata.shared,
        refilled=refilled(compiled.asm["ttgir"], compiled.metadata.num_stages),
        barriers=len(re.findall(r"\bbarrier\b", compiled.asm["ttgir"])),  # the kernel's own, not those that Triton adds
        instructions={k: v for k, v in counts.items() if v},
    )
