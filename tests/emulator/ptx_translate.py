"""Translates PTX, nvcc's assembly for a virtual architecture, to C++ that runs on the CPU.

Each `.entry` becomes a function of its parameters' addresses that runs one thread. A register
becomes an unsigned integer of its width, so every operation is the one that PTX defines; barriers,
shuffles and clusters are the emulator's (ptx_prelude.h). The subset is what nvcc emits for
csrc/cuda. An unknown instruction is an error: in particular `add.f32` without `.rn`, which the
assembler may fuse with a multiplication.

Source: "PTX ISA", https://docs.nvidia.com/cuda/parallel-thread-execution/.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

REGISTERS = {
    "pred": "bool",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "busf" for bits in (8, 16, 32, 64)},
}
SPECIAL = {
    "%tid.x": "threadIdx.x",
    "%ntid.x": "blockDim.x",
    "%ctaid.x": "blockIdx.x",
    "%nctaid.x": "gridDim.x",
}
DYNAMIC_SHARED = "_ZN9coup_fast4cuda14dynamic_sharedE"


class PtxError(ValueError):
    """What the translator does not know, with the place."""


def c_type(kind: str) -> str:
    """The C++ type in which an operand of a PTX type is computed with."""
    if kind in ("pred", "f32"):
        return "bool" if kind == "pred" else "float"
    if match := re.fullmatch(r"([bus])(8|16|32|64)", kind):
        return f"{'' if match[1] == 's' else 'u'}int{match[2]}_t"
    raise PtxError(f"unknown type .{kind}")


def width(kind: str) -> int:
    return 1 if kind == "pred" else int(kind[1:])


def unsigned(kind: str) -> str:
    return f"u{width(kind)}"


def _same_type() -> dict[str, tuple[str, str]]:
    """Instructions whose operands and result have one type: that type, and an expression."""
    wrapping = {"add": "a + b", "sub": "a - b", "neg": "0 - a"}  # so computed without sign
    wrapping |= {"mul.lo": "a * b", "mad.lo": "a * b + c"}
    signed = {"div": "a / b", "rem": "a % b", "min": "b < a ? b : a", "max": "a < b ? b : a"}
    bitwise = {"and": "a & b", "or": "a | b", "xor": "a ^ b"}
    table = {
        "add.rn.f32": ("f32", "a + b"),
        "sub.rn.f32": ("f32", "a - b"),
        "mul.rn.f32": ("f32", "a * b"),
        "div.rn.f32": ("f32", "a / b"),
        "fma.rn.f32": ("f32", "ptx::fma(a, b, c)"),
        "rcp.rn.f32": ("f32", "1.0f / a"),
        "sqrt.rn.f32": ("f32", "__builtin_sqrtf(a)"),
        "rsqrt.approx.ftz.f32": ("f32", "ptx::rsqrt_approx(a)"),
        "max.f32": ("f32", "__builtin_fmaxf(a, b)"),
        "neg.f32": ("b32", "a ^ 0x80000000u"),
        "prmt.b32": ("b32", "ptx::prmt(a, b, c)"),
        "bfe.u32": ("u32", "ptx::bfe(a, b, c)"),
    }
    for kind in ("s32", "u32", "s64", "u64"):
        table |= {f"{name}.{kind}": (unsigned(kind), text) for name, text in wrapping.items()}
        table |= {f"{name}.{kind}": (kind, text) for name, text in signed.items()}
    for kind in ("pred", "b16", "b32", "b64"):
        table |= {f"{name}.{kind}": (kind, text) for name, text in bitwise.items()}
        table[f"not.{kind}"] = (kind, "!a" if kind == "pred" else "~a")
    return table


SAME_TYPE = _same_type()
# Conversions that round or change the format: to, from, expression.
CONVERSIONS = {
    "cvt.f32.f16": ("f32", "b16", "ptx::from_half(a)"),
    "cvt.rn.f16.f32": ("b16", "f32", "ptx::to_half(a)"),
    "cvt.rn.bf16.f32": ("b16", "f32", "ptx::to_bfloat16(a)"),
    "cvt.rn.f32.s32": ("f32", "s32", "static_cast<float>(a)"),
    "cvt.rn.f32.u32": ("f32", "u32", "static_cast<float>(a)"),
}
INTEGER_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# With a NaN the ordered ones are false, those that end with u true.
FLOAT_COMPARISONS = {
    "eq": "a == b", "lt": "a < b", "le": "a <= b", "gt": "a > b", "ge": "a >= b",
    "equ": "!(a < b || a > b)", "neu": "!(a == b)",
    "ltu": "!(a >= b)", "leu": "!(a > b)", "gtu": "!(a <= b)", "geu": "!(a < b)",
    "num": "a == a && b == b", "nan": "!(a == a && b == b)",
}  # fmt: skip
CALLS = {
    "barrier.cluster.arrive": "emulator::cluster_arrive()",
    "barrier.cluster.wait": "emulator::cluster_wait()",
}


class Kernel:
    """One `.entry`: `statements` are (line, text), a label with its colon, a brace by itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.parameters: list[str] = []
        self.statements: list[tuple[int, str]] = []
        self._registers: dict[str, str] = {}

    def translated(self, function: str) -> str:
        lines = [f'extern "C" void {function}([[maybe_unused]] const void* const* parameters) {{']
        for line, text in self.statements:
            try:
                lines.append(self._statement(text))
            except (
                TypeError,
                ValueError,
            ) as error:  # other operands than the method of its name has
                raise PtxError(f"{line}: {error} in `{text}`") from error
        return "\n".join([*lines, "}"])

    # --- operands ---------------------------------------------------------------------------

    def _read(self, token: str, kind: str, wider: bool = False) -> str:
        """The operand as an expression of the type `kind`; a wider register is cut."""
        want = c_type(kind)
        if token.startswith("!"):
            return f"!{self._read(token[1:], kind)}"
        if token in SPECIAL:
            return f"static_cast<{want}>({SPECIAL[token]})"
        if token in self._registers:
            self._check_width(token, kind, wider)
            name = _identifier(token)
            return f"ptx::bits<float>({name})" if kind == "f32" else f"static_cast<{want}>({name})"
        if re.fullmatch(r"0f[0-9A-Fa-f]{8}", token):
            word = f"uint32_t{{0x{token[2:]}u}}"
            return f"ptx::bits<float>({word})" if kind == "f32" else f"static_cast<{want}>({word})"
        if re.fullmatch(r"-?\d+|0x[0-9A-Fa-f]+", token) and kind != "f32":
            return f"static_cast<{want}>({token}{'ll' if token[0] == '-' else 'ull'})"
        if token in self.parameters:
            return f"reinterpret_cast<uint64_t>(parameters[{self.parameters.index(token)}])"
        if token == DYNAMIC_SHARED:
            return f"{want}{{0}}"  # an address of shared memory is an offset in it
        raise PtxError(f"unknown operand {token}")

    def _write(self, token: str, kind: str, expression: str, wider: bool = False) -> str:
        """An assignment; a register that is wider than the type is filled with the sign."""
        if token == "_":  # PTX's name for a result that nobody reads
            return ""
        if token not in self._registers:
            raise PtxError(f"unknown register {token}")
        self._check_width(token, kind, wider)
        value = f"ptx::bits<uint32_t>({expression})" if kind == "f32" else expression
        held, computed = REGISTERS[self._registers[token]], c_type(kind)
        cast = f"static_cast<{computed}>({value})" if kind != "f32" else value
        return f"{_identifier(token)} = static_cast<{held}>({cast});"

    def _check_width(self, token: str, kind: str, may_be_wider: bool) -> None:
        held = self._registers[token]
        fits = width(held) == width(kind) or (may_be_wider and width(held) > width(kind))
        if not fits or (held == "pred") != (kind == "pred"):
            raise PtxError(f"register {token} is .{held}, not .{kind}")

    def _address(self, space: str, token: str) -> str:
        match = re.fullmatch(r"\[([^\]+]+)(?:\+(-?\d+))?\]", token)
        if not match:
            raise PtxError(f"unknown address {token}")
        base, offset = match[1], f"{int(match[2] or 0)}ll"
        if space == "shared":
            kind = self._registers.get(base, "b32")
            return f"ptx::shared({self._read(base, unsigned(kind))} + {offset})"
        return f"reinterpret_cast<char*>({self._read(base, 'u64')} + {offset})"

    # --- statements -------------------------------------------------------------------------

    def _statement(self, text: str) -> str:
        if text in ("{", "}"):
            return text
        if text.endswith(":"):
            return f"{_identifier(text[:-1])}:;"
        if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(%?\w+)(?:<(\d+)>)?", text):
            kind, name, count = match.groups()
            if kind not in REGISTERS:
                raise PtxError(f"unknown type .{kind}")
            names = [f"{name}{i}" for i in range(int(count))] if count else [name]
            self._registers |= dict.fromkeys(names, kind)
            listed = ", ".join(map(_identifier, names))
            return f"[[maybe_unused]] {REGISTERS[kind]} {listed};"
        match = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.]*)\s*(.*)", text, re.DOTALL)
        if not match:
            raise PtxError("unknown statement")
        guard, instruction, rest = match.groups()
        done = self._instruction(instruction, _operands(rest))
        done = f"if ({self._read(guard, 'pred')}) {{ {done} }}" if guard else done
        return f"COUNT({_class_of(instruction)}) {done}"

    def _instruction(self, name: str, operands: list[str]) -> str:
        first, *modifiers = name.split(".")
        if name in SAME_TYPE:
            kind, expression = SAME_TYPE[name]
            return self._computed(operands, kind, kind, expression)
        if name in CONVERSIONS:
            return self._computed(operands, *CONVERSIONS[name])
        if name in CALLS and not operands:
            return f"{CALLS[name]};"
        if name == "ret":
            return "return;"
        if name in ("bra", "bra.uni"):
            return f"goto {_identifier(operands[0])};"
        if name == "bar.sync" and operands == ["0"]:
            return "emulator::block_barrier();"
        method: Callable[..., str] | None = getattr(self, f"_{first}", None)
        if method is not None and (done := method(modifiers, *operands)):
            return done
        raise PtxError(f"unknown instruction {name}")

    def _computed(self, operands: list[str], to: str, kind: str, expression: str) -> str:
        """{ const T a = ..., b = ...; result = expression; }"""
        result, *given = operands
        if len(given) != len(set(re.findall(r"\b[abc]\b", expression))):
            raise PtxError(f"{len(given)} operands")
        named = zip("abc", given, strict=False)
        values = ", ".join(f"{name} = {self._read(token, kind)}" for name, token in named)
        return f"{{ const {c_type(kind)} {values}; {self._write(result, to, expression)} }}"

    # One method an instruction, called with its modifiers and operands; "" for unknown modifiers.

    def _ld(self, modifiers: list[str], data: str, address: str) -> str:
        return self._memory(modifiers, address, data, load=True)

    def _st(self, modifiers: list[str], address: str, data: str) -> str:
        return self._memory(modifiers, address, data, load=False)

    def _memory(self, modifiers: list[str], address: str, data: str, load: bool) -> str:
        pattern = r"(?:(param|global|shared)\.)?(?:(cs)\.)?(?:v([24])\.)?([busf]\d+)"
        match = re.fullmatch(pattern, ".".join(modifiers))
        if not match:
            return ""
        space, streaming, count, kind = match.groups()
        registers = _operands(data.strip("{}"))
        if len(registers) != int(count or 1):
            raise PtxError(f"{len(registers)} operands")
        size = width(kind) // 8
        lines = [f"char* const at = {self._address(space, address)};"]
        lines.append(f"ptx::check_alignment(at, {size * len(registers)});")
        if streaming and load:  # __ldcs, whose bytes the emulator counts
            lines.append(f"emulator::count_load({size * len(registers)});")
        for i, register in enumerate(registers):
            if load:
                value = f"ptx::load<{c_type(kind)}>(at + {i * size})"
                lines.append(self._write(register, kind, value, wider=True))
            else:
                value = self._read(register, kind, wider=True)
                lines.append(f"ptx::store<{c_type(kind)}>(at + {i * size}, {value});")
        return f"{{ {' '.join(lines)} }}"

    def _mov(self, modifiers: list[str], to: str, source: str) -> str:
        (kind,) = modifiers
        half = width(kind) // 2
        if to.startswith("{"):
            half = width(kind) // 2
            parts = _operands(to.strip("{}"))
            writes = [
                self._write(t, f"b{half}", f"whole >> {half * i}") for i, t in enumerate(parts)
            ]
            return (
                f"{{ const {c_type(kind)} whole = {self._read(source, kind)}; {' '.join(writes)} }}"
            )
        if source.startswith("{"):
            half = width(kind) // 2
            low, high = (self._read(t, f"b{half}") for t in _operands(source.strip("{}")))
            joined = f"{c_type(kind)}{{{low}}} | {c_type(kind)}{{{high}}} << {half}"
            return self._write(to, kind, joined)
        # The bits, also of a register of another kind.
        kind = kind if kind == "pred" else unsigned(kind)
        return self._write(to, kind, self._read(source, kind))

    def _cvt(self, modifiers: list[str], to: str, source: str) -> str:
        if len(modifiers) != 2 or not all(re.fullmatch(r"[us]\d+", kind) for kind in modifiers):
            return ""
        return self._write(
            to, modifiers[0], self._read(source, modifiers[1], wider=True), wider=True
        )

    def _cvta(self, modifiers: list[str], to: str, source: str) -> str:
        if modifiers == ["to", "global", "u64"]:
            return self._write(to, "u64", self._read(source, "u64"))
        if modifiers == ["shared", "u64"]:
            shared = f"ptx::shared({self._read(source, 'u64')})"
            return self._write(to, "u64", f"reinterpret_cast<uint64_t>({shared})")
        return ""

    def _setp(self, modifiers: list[str], to: str, a: str, b: str) -> str:
        if len(modifiers) != 2:
            return ""
        comparison, kind = modifiers
        if kind == "f32" and comparison in FLOAT_COMPARISONS:
            return self._computed([to, a, b], "pred", kind, FLOAT_COMPARISONS[comparison])
        if kind[0] in "bus" and comparison in INTEGER_COMPARISONS:
            expression = f"a {INTEGER_COMPARISONS[comparison]} b"
            return self._computed([to, a, b], "pred", kind, expression)
        return ""

    def _selp(self, modifiers: list[str], to: str, a: str, b: str, chosen: str) -> str:
        kind = unsigned(modifiers[0])
        value = f"{self._read(chosen, 'pred')} ? {self._read(a, kind)} : {self._read(b, kind)}"
        return self._write(to, kind, value)

    def _shl(self, modifiers: list[str], to: str, value: str, by: str) -> str:
        return self._shift("left", modifiers, to, value, by)

    def _shr(self, modifiers: list[str], to: str, value: str, by: str) -> str:
        return self._shift("right", modifiers, to, value, by)

    def _shift(self, way: str, modifiers: list[str], to: str, value: str, by: str) -> str:
        (kind,) = modifiers
        moved = f"ptx::{way}<{c_type(kind)}>({self._read(value, kind)}, {self._read(by, 'u32')})"
        return self._write(to, kind, moved)

    def _mul(self, modifiers: list[str], to: str, a: str, b: str) -> str:
        if modifiers not in (["wide", "u32"], ["wide", "s32"]):
            return ""
        kind = modifiers[1]
        wide = f"{kind[0]}64"
        product = f"{c_type(wide)}{{{self._read(a, kind)}}} * {self._read(b, kind)}"
        return self._write(to, wide, product)

    def _mapa(self, modifiers: list[str], to: str, address: str, rank: str) -> str:
        if modifiers != ["u64"]:
            return ""
        mapped = f"ptx::mapa({self._read(address, 'u64')}, {self._read(rank, 'u32')})"
        return self._write(to, "u64", mapped)

    def _shfl(self, modifiers: list[str], to: str, *operands: str) -> str:
        if modifiers != ["sync", "bfly", "b32"]:
            return ""
        value, _, took_part = to.partition("|")
        arguments = ", ".join(self._read(token, "u32") for token in operands)
        done = self._write(value, "u32", f"ptx::butterfly({arguments})")
        return f"{done} {self._write(took_part or '_', 'pred', 'true')}"


def _class_of(instruction: str) -> str:
    """Under which of emulator::Executed an instruction is counted, when instructions are."""
    first = instruction.split(".")[0]
    if first in ("ld", "st", "shfl") and not instruction.startswith("ld.param"):
        return "kMemory"
    if first in ("ld", "mov", "cvta", "mapa", "bra", "ret", "bar", "barrier"):
        return "kOther"
    return "kFloat" if re.search(r"\.b?f(16|32)\b", instruction) else "kInteger"


def _identifier(token: str) -> str:
    return "r_" + token.replace("%", "").replace("$", "label")


def _operands(text: str) -> list[str]:
    """Split at the commas outside of braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{])+", text) if part.strip()]


def kernels(ptx: str) -> Iterator[Kernel]:
    """The kernels of a module. Whatever else it declares is an unknown operand where it is used."""
    kernel: Kernel | None = None
    depth, pending = 0, ""
    for number, whole in enumerate(ptx.splitlines(), 1):
        line = whole.split("//")[0].strip()
        if match := re.search(r"\.entry\s+(\w+)", line):
            kernel, depth, pending = Kernel(match[1]), 0, ""
        elif kernel is None:
            continue
        elif depth == 0:
            kernel.parameters += re.findall(r"\.param\s.*?(\w+)(?:\[\d+\])?,?$", line)
            depth = int(line == "{")
        elif re.match(r"\.(loc|pragma)\b", line):
            continue
        else:
            pending = f"{pending} {line}".strip()
            while pending:
                if pending[0] in "{}":
                    depth += 1 if pending[0] == "{" else -1
                    if depth == 0:
                        yield kernel
                        kernel = None
                        break
                    end = 1
                elif match := re.match(r"\$\w+:", pending):
                    end = match.end()
                elif ";" in pending:
                    end = pending.index(";") + 1
                else:
                    break  # the statement ends on another line
                kernel.statements.append((number, pending[:end].rstrip(";")))
                pending = pending[end:].strip()
    if kernel is not None:
        raise PtxError(f"the kernel {kernel.name} has no end")


def translate(ptx: str, file: str, prefix: str = "ptx_") -> str:
    """C++ of all kernels of a PTX module, named by `prefix` and the kernel's mangled name.

    Raises PtxError, "file:line: what is unknown in `statement`".
    """
    parts = ['#include "ptx_prelude.h"']
    try:
        parts += [kernel.translated(prefix + kernel.name) for kernel in kernels(ptx)]
    except PtxError as error:
        raise PtxError(f"{file}:{error}") from None
    return "\n\n".join(parts) + "\n"
