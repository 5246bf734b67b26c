"""The translator of PTX, on instructions whose results PTX defines. Needs no nvcc."""

from __future__ import annotations

import ctypes
import shutil
import struct

import pytest
from emulator.ptx_translate import PtxError, translate

COUNTED = "-DCOUP_FAST_COUNTED"
NAN, MINUS_ZERO = 0x7FC00000, 0x80000000


def word(value: float) -> int:
    return struct.unpack("I", struct.pack("f", value))[0]


def kernel(name: str, body: str) -> str:
    """Words 0 and 1 of a buffer are %r1, %f1 and %r2, %f2; %r3 is written to word 4."""
    return f"""
.visible .entry {name}(
	.param .u64 {name}_param_0
)
.maxntid 256, 1, 1
{{
	.reg .pred 	%p<4>;
	.reg .b16 	%rs<4>;
	.reg .f32 	%f<5>;
	.reg .b32 	%r<8>;
	.reg .b64 	%rd<4>;

	ld.param.u64 	%rd1, [{name}_param_0];
	cvta.to.global.u64 	%rd2, %rd1;
	ld.global.v2.u32 	{{%r1, %r2}}, [%rd2];
	mov.b32 	%f1, %r1;
	mov.b32 	%f2, %r2;
	mov.u32 	%r3, 0;
	{body}
	st.global.u32 	[%rd2+16], %r3;
	ret;
}}
"""


def of_floats(instruction: str) -> str:
    return f"{instruction} mov.b32 %r3, %f3;"


def compared(comparison: str) -> str:
    return f"setp.{comparison} %p1, %f1, %f2; selp.b32 %r3, 1, 0, %p1;"


LOOP = """
$L__BB0_1:
	add.s32 	%r3, %r3, %r1;
	add.s32 	%r2, %r2, -1;
	setp.ne.s32 	%p1, %r2, 0;
	@%p1 bra 	$L__BB0_1;
"""
SCOPE = """
	// begin inline asm
	{ .reg .b32 %tmp;
	add.s32 	%tmp, %r1, 1;
	shl.b32 	%r3, %tmp, 4; }
	// end inline asm
"""
THIRD = word(1 / 3)

# What it shows: instructions, words 0 and 1, the result.
CASES = {
    "sums wrap": ("add.s32 %r3, %r1, %r2;", 0x7FFFFFFF, 2, 0x80000001),
    "products wrap": ("mad.lo.s32 %r3, %r1, %r1, %r2;", 0x10001, 5, 0x20006),
    "a wide product is signed": (
        "mul.wide.s32 %rd3, %r1, %r2; mov.b64 {_, %r3}, %rd3;", 0xFFFFFFFF, 1, 0xFFFFFFFF,
    ),
    "a wide product is unsigned": (
        "mul.wide.u32 %rd3, %r1, %r2; mov.b64 {_, %r3}, %rd3;", 0xFFFFFFFF, 2, 1,
    ),
    "division rounds to zero": ("div.s32 %r3, %r1, %r2;", -7 & 0xFFFFFFFF, 2, -3 & 0xFFFFFFFF),
    "a rest has the dividend's sign": ("rem.s32 %r3, %r1, 2;", -7 & 0xFFFFFFFF, 0, 0xFFFFFFFF),
    "unsigned division": ("div.u32 %r3, %r1, %r2;", 0xFFFFFFFE, 2, 0x7FFFFFFF),
    "the least is signed": ("min.s32 %r3, %r1, %r2;", 0xFFFFFFFF, 3, 0xFFFFFFFF),
    "a shift by the width": ("shl.b32 %r3, %r1, 32;", 0xFFFFFFFF, 0, 0),
    "a signed shift beyond the width": ("shr.s32 %r3, %r1, 40;", MINUS_ZERO, 0, 0xFFFFFFFF),
    "a shift keeps the sign": ("shr.s32 %r3, %r1, %r2;", MINUS_ZERO, 4, 0xF8000000),
    "an unsigned shift": ("shr.u32 %r3, %r1, %r2;", MINUS_ZERO, 4, 0x08000000),
    "bytes are permuted": ("prmt.b32 %r3, %r1, %r2, 0x7531;", 0x33221100, 0x77665544, 0x77553311),
    "a byte's sign is spread": ("prmt.b32 %r3, %r1, %r2, 0x0008;", 0x00000180, 0, 0x808080FF),
    "a field": ("bfe.u32 %r3, %r1, 8, 12;", 0xABCDEF12, 0, 0xDEF),
    "narrowed and widened with the sign": (
        "cvt.u16.u32 %rs1, %r1; cvt.s32.s16 %r3, %rs1;", 0x12348001, 0, 0xFFFF8001,
    ),
    "halves of a word": (
        "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r3, {%rs2, %rs1};", 0x12345678, 0, 0x56781234,
    ),
    "a byte without sign": ("ld.global.u8 %r3, [%rd2+3];", 0xFE000000, 0, 0xFE),
    "a byte with its sign": ("ld.global.s8 %r3, [%rd2+3];", 0xFE000000, 0, 0xFFFFFFFE),
    "bits of a predicate": (
        "setp.lt.u32 %p1, %r1, %r2; not.pred %p2, %p1; selp.b32 %r3, 5, 6, %p2;", 1, 2, 6,
    ),
    "a signed comparison": ("setp.lt.s32 %p1, %r1, %r2; @!%p1 mov.u32 %r3, 9;", 1, 0xFFFFFFFF, 9),
    "a loop": (LOOP, 3, 5, 15),
    "a scope": (SCOPE, 2, 0, 48),
    "a constant": (of_floats("add.rn.f32 %f3, %f1, 0fBF800000;"), word(3), 0, word(2)),
    "a negated zero": (of_floats("neg.f32 %f3, %f1;"), 0, 0, MINUS_ZERO),
    "fma rounds once": (
        of_floats("fma.rn.f32 %f3, %f1, 0f40400000, 0fBF800000;"), THIRD, 0, word(2.0**-25),
    ),
    "a product rounds": (
        of_floats("mul.rn.f32 %f4, %f1, 0f40400000; sub.rn.f32 %f3, %f4, 0f3F800000;"), THIRD, 0, 0,
    ),
    "a root": (of_floats("sqrt.rn.f32 %f3, %f1;"), word(2), 0, 0x3FB504F3),
    "a reciprocal root": (of_floats("rsqrt.approx.ftz.f32 %f3, %f1;"), word(0.25), 0, word(2)),
    "a reciprocal root, a unit off": (
        of_floats("rsqrt.approx.ftz.f32 %f3, %f1;"), word(4), 0, word(0.5) - 1,
    ),
    "the larger": (of_floats("max.f32 %f3, %f1, 0f3F800000;"), word(-2), 0, word(1)),
    "a reciprocal": (of_floats("rcp.rn.f32 %f3, %f1;"), word(3), 0, 0x3EAAAAAB),
    "less is false with a NaN": (compared("lt.f32"), NAN, 0, 0),
    "less or unordered is true with a NaN": (compared("ltu.f32"), NAN, 0, 1),
    "not less or unordered": (compared("ltu.f32"), word(1), word(1), 0),
    "unequal or unordered": (compared("neu.f32"), NAN, NAN, 1),
    "is NaN": (compared("nan.f32"), word(1), NAN, 1),
    "half": ("cvt.rn.f16.f32 %rs1, %f1; cvt.u32.u16 %r3, %rs1;", word(65520), 0, 0x7C00),
    "half, subnormal": (
        of_floats("mov.u16 %rs1, 1; cvt.f32.f16 %f3, %rs1;"), 0, 0, word(2**-24),
    ),
    "bfloat16, a tie to even": (
        "cvt.rn.bf16.f32 %rs1, %f1; cvt.u32.u16 %r3, %rs1;", 0x3F818000, 0, 0x3F82,
    ),
    "bfloat16, a tie that stays": (
        "cvt.rn.bf16.f32 %rs1, %f1; cvt.u32.u16 %r3, %rs1;", 0x3F808000, 0, 0x3F80,
    ),
    "an integer as float": (of_floats("cvt.rn.f32.u32 %f3, %r1;"), 0xFFFFFFFF, 0, word(2.0**32)),
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All cases in one module, beside the emulator."""
    if shutil.which("c++") is None:
        pytest.skip("translations are built by the C++ compiler")
    from emulator import build

    folder = tmp_path_factory.mktemp("ptx")
    text = "".join(kernel(f"k{i}", case[0]) for i, case in enumerate(CASES.values()))
    source = folder / "cases.cpp"
    source.write_text(translate(text, "cases.ptx"))
    parts = []
    for path in (source, build.HERE / "emulator.cpp"):
        parts.append(folder / f"{path.stem}.o")
        build.compile_source(path, parts[-1], "-fvisibility=default", "-Werror", COUNTED)
    build.link(parts, folder / "cases.so")
    return ctypes.CDLL(str(folder / "cases.so"))


def run(library: ctypes.CDLL, name: str) -> list[int]:
    """The buffer after the case's kernel has run."""
    _, first, second, _ = CASES[name]
    buffer = (ctypes.c_uint32 * 8)(first, second, 0, 0, 7, 7, 7, 7)
    pointer = ctypes.c_uint64(ctypes.addressof(buffer))
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(pointer))
    getattr(library, f"ptx_k{list(CASES).index(name)}")(parameters)
    return list(buffer)


@pytest.mark.parametrize("name", CASES)
def test_an_instruction(library: ctypes.CDLL, name: str) -> None:
    _, first, second, expected = CASES[name]
    *given, result = run(library, name)[:5]
    assert f"{result:#010x}" == f"{expected:#010x}"
    assert given == [first, second, 0, 0]


def test_instructions_are_counted(library: ctypes.CDLL) -> None:
    """Floats, integers, memory, others: of a start, five turns of a loop and an end."""
    count = library.emulated_executed
    count.restype = ctypes.c_uint64
    for kind in range(4):
        count(kind)
    run(library, "a loop")
    assert [count(kind) for kind in range(4)] == [0, 5 * 3, 1 + 1, 5 + 5 + 1]


@pytest.mark.parametrize(
    ("statement", "unknown"),
    [
        ("add.f32 \t%f3, %f1, %f2;", "unknown instruction add.f32"),  # ptxas may fuse it
        ("fma.rn.ftz.f32 %f3, %f1, %f2, %f1;", "unknown instruction fma.rn.ftz.f32"),
        ("call.uni helper, (%r1);", "unknown instruction call.uni"),
        ("bar.sync 1;", "unknown instruction bar.sync"),
        ("atom.global.add.u32 %r3, [%rd2], %r1;", "unknown instruction atom.global.add.u32"),
        ("ld.const.u32 %r3, [%rd2];", "unknown instruction ld.const.u32"),
        ("add.s32 %r3, %r1, %r9;", "unknown operand %r9"),
        ("mov.u32 %r9, 1;", "unknown register %r9"),
        ("mov.u64 %rd3, table;", "unknown operand table"),
        ("add.s32 %r3, %r1, %rd1;", "register %rd1 is .b64, not .u32"),
        ("add.s32 %r3, %r1;", "1 operands"),
        (".local .align 4 .b8 depot[16];", "unknown statement"),
    ],
)
def test_what_is_unknown_is_an_error_that_names_the_line(statement: str, unknown: str) -> None:
    text = kernel("k", statement)
    line = text.splitlines().index(f"\t{statement}") + 1
    with pytest.raises(PtxError) as error:
        translate(text, "step.ptx")
    assert str(error.value).startswith(f"step.ptx:{line}: {unknown} in `")


def test_a_cut_file_is_an_error() -> None:
    text = kernel("k", "").rstrip().removesuffix("}")
    with pytest.raises(PtxError, match=r"step.ptx:the kernel k has no end"):
        translate(text, "step.ptx")


def test_parameters_are_told_apart() -> None:
    text = kernel("k", "ld.param.u32 %r3, [k_param_1+8];")
    text = text.replace("k_param_0\n)", "k_param_0,\n\t.param .align 8 .b8 k_param_1[16]\n)")
    assert "parameters[1]) + 8ll" in translate(text, "step.ptx")
