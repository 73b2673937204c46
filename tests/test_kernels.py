"""Kernels for packed weights give what torch's own operations give, whatever widths, shapes, threads and compiler."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coterie
from coterie.anatomy import moe_layers
from coterie.anatomy.forms import ExpertBits, Form, Linears, apply_forms, apply_linears, projection_shapes
from coterie.experts import kernels, packed, packing
from coterie.experts.forward import observe, rerouted
from coterie.experts.kernels import build, cpu
from coterie.experts.packed import PLAIN, Stack
from coterie.experts.packing import Coded
from families import FEW, tiny

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PORTABLE = tuple(flag for flag in build.FLAGS if not flag.startswith("-march"))


def stack(bits, shape, group, *, symmetric=False, dtype=torch.float32, seed=0):
    """Random experts of these widths, 16 for one that is not quantized."""
    generator = torch.Generator().manual_seed(seed)
    O, G = shape[0], packing.groups(shape[1], group)  # noqa: E741
    matrices = []
    for b in bits:
        if b == PLAIN:
            matrices.append(torch.randn(shape, generator=generator))
            continue
        codes = torch.randint(0, 2**b, shape, generator=generator, dtype=torch.uint8)
        scale = torch.rand(O, G, generator=generator) / 2**b
        zero = None if symmetric else torch.rand(O, G, generator=generator) * 2**b
        matrices.append(Coded(codes, b, group, scale, zero))
    parts = packed.assembled(matrices, shape, group, dtype, symmetric=symmetric)
    return Stack(tuple(bits), shape, group, parts["packed"], parts["scale"], parts.get("zero"), parts["plain"])


def error(y_RO, s, x_RI, counts):
    """Largest distance to the product in float64, in units of the sum of what was added up."""
    exact = kernels.reference(s, x_RI.double(), counts)
    sizes = [x.double().abs() @ s.dense(e).double().abs().T for e, x in enumerate(torch.split(x_RI, counts))]
    return ((y_RO.double() - exact).abs() / (torch.cat(sizes) + 1e-30)).max().item() if len(y_RO) else 0.0


@contextlib.contextmanager
def built_with(flags):
    lib, before = build.library(flags), cpu.kernel
    cpu.kernel = lambda: lib
    try:
        yield lib
    finally:
        cpu.kernel = before


@pytest.fixture(params=["this processor", "any processor"])
def flags(request):
    return build.FLAGS if request.param == "this processor" else PORTABLE


WIDTHS = st.sampled_from([*packing.WIDTHS, PLAIN])


@settings(max_examples=120, deadline=None)
@given(
    experts=st.lists(st.tuples(WIDTHS, st.integers(0, 9)), min_size=1, max_size=5),
    outputs=st.integers(1, 90),
    inputs=st.one_of(st.integers(1, 260), st.sampled_from([1024, 1088, 1500])),
    group=st.one_of(st.sampled_from([32, 64, 128]), st.integers(1, 300)),
    symmetric=st.booleans(),
    stored=st.sampled_from(DTYPES),
    given=st.sampled_from(DTYPES),
    portable=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_grouped_products_are_those_of_the_unpacked_matrices(
    experts, outputs, inputs, group, symmetric, stored, given, portable, seed
):
    bits, counts = zip(*experts)
    s = stack(bits, (outputs, inputs), group, symmetric=symmetric, dtype=stored, seed=seed)
    x = torch.randn(sum(counts), inputs, generator=torch.Generator().manual_seed(seed)).to(given)
    with built_with(PORTABLE if portable else build.FLAGS):
        y = kernels.grouped(s, x, list(counts))
    assert y.dtype == torch.float32
    assert error(y, s, x, list(counts)) < 1e-6


@pytest.mark.parametrize("rows", range(1, 41, 3))
@pytest.mark.parametrize("bits", [*packing.WIDTHS, PLAIN])
def test_any_number_of_rows_is_multiplied(bits, rows, flags):
    s = stack([bits], (50, 200), 64)
    x = torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows))
    with built_with(flags):
        assert error(kernels.grouped(s, x, [rows]), s, x, [rows]) < 1e-6


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_few_rows_of_every_dtype_are_multiplied_to_the_last_column(bits, group, rows):
    for columns, dtype in ((128, torch.bfloat16), (333, torch.bfloat16), (768, torch.bfloat16), (333, torch.float16)):
        s = stack([bits], (45, columns), group, dtype=torch.bfloat16)
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
        assert error(kernels.grouped(s, x, [rows]), s, x, [rows]) < 1e-6


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_infinite_input_gives_what_the_unpacked_matrix_gives(bits):
    s = stack([bits], (45, 256), 64, dtype=torch.bfloat16)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, 7] = float("inf")
    y, exact = kernels.grouped(s, x, [2]), kernels.reference(s, x.double(), [2])
    assert torch.equal(y[0].double(), exact[0])
    assert y[1].isfinite().all()


def test_rows_may_be_taken_from_anywhere_and_results_put_anywhere(flags):
    s = stack([3, PLAIN, 4], (10, 70), 32)
    x, counts = torch.randn(4, 140)[:, ::2], [2, 1, 6]
    row = torch.tensor([3, 0, 1, 1, 2, 3, 0, 0, 2])
    out = torch.full((9, 20), 7.0)
    with built_with(flags):
        kernels.grouped(s, x, counts, row, out[:, 1::2])
    assert error(out[:, 1::2], s, x[row], counts) < 1e-6
    assert (out[:, ::2] == 7).all()


@pytest.mark.parametrize("rows", [1, 3, 30])
def test_the_number_of_threads_does_not_change_a_bit(rows, flags):
    s = stack([2, 3, 4, 8, PLAIN], (100, 1500), 64)
    x, counts, before = torch.randn(5 * rows, 1500), [rows] * 5, torch.get_num_threads()
    try:
        with built_with(flags):
            torch.set_num_threads(1)
            one = kernels.grouped(s, x, counts)
            torch.set_num_threads(2)
            assert torch.equal(kernels.grouped(s, x, counts), one)
    finally:
        torch.set_num_threads(before)


def test_a_scale_that_is_not_a_number_shows_in_its_output_only(flags):
    s = stack([4], (5, 128), 64)
    s.scale_QOG[0, 2, 1] = float("nan")
    with built_with(flags):
        assert kernels.grouped(s, torch.randn(2, 128), [2]).isnan()[0].tolist() == [False, False, True, False, False]


GUARDED = """
import ctypes, mmap, sys, torch
from coterie.experts import kernels
from test_kernels import PORTABLE, build, built_with, packing, stack
from coterie.experts.packed import PLAIN, Stack

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
held = []

def guarded(tensor):  # its last byte is the last one that may be read
    size = max(tensor.numel() * tensor.element_size(), 1)
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    held.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(start + pages * mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
    if not tensor.numel():
        return tensor
    offset = pages * mmap.PAGESIZE - size
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)

torch.set_num_threads(1)
for flags in (build.FLAGS, PORTABLE):
    with built_with(flags):
        for bits in (*packing.WIDTHS, PLAIN):
            for columns in (1, 33, 63, 64, 65, 100, 191):
                for group in (7, 32, 64):
                    for rows in (1, 6):
                        s = stack([bits], (3, columns), group, dtype=torch.bfloat16)
                        parts = [guarded(t) for t in (s.words, s.scale_QOG, s.zero_QOG, s.plain)]
                        x = guarded(torch.randn(rows, columns))
                        y = kernels.grouped(Stack(s.bits, s.shape, group, *parts), x, [rows])
                        assert torch.equal(y, kernels.grouped(s, x, [rows]))
                        held.clear()
print("read nothing else")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_no_byte_behind_a_tensor_is_read():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "read nothing else" in done.stdout


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_kernel_shares_the_openmp_runtime_of_torch():
    code = """
import re, torch
from coterie.experts.kernels import cpu
lib = cpu.kernel()
assert lib is not None and lib.coterie_threaded()
print(*set(re.findall(r"\\S*lib(?:g|i)?omp\\S*\\.so\\S*", open("/proc/self/maps").read())))
"""  # in a process of its own: other libraries of this one may bring a runtime along
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert len(done.stdout.split()) == 1, done.stdout


# ---- GPUs


INTERPRETED = """
import random, torch
from test_kernels import DTYPES, PLAIN, error, packing, stack
from coterie.experts.kernels import triton_grouped

for seed in range(40):
    draw = random.Random(seed)
    bits = [draw.choice([*packing.WIDTHS, PLAIN]) for _ in range(draw.randint(1, 5))]
    counts = [draw.choice([0, 1, 3, 17, 70]) for _ in bits]
    shape, group = (draw.choice([5, 64, 70]), draw.choice([7, 64, 100, 130])), draw.choice([5, 24, 32, 64, 128, 1000])
    dtype, stored = draw.choice(DTYPES), draw.choice(DTYPES)
    s = stack(bits, shape, group, symmetric=draw.random() < 0.5, dtype=stored, seed=seed)
    x, row = torch.randn(9, 2 * shape[1]).to(dtype)[:, : shape[1]], torch.randint(0, 9, (sum(counts),))
    out = torch.full((sum(counts), 2 * shape[0]), 7.0)
    triton_grouped.grouped(s, x, counts, row, out[:, ::2])
    found = error(out[:, ::2], s, x[row], counts)
    assert found < (1e-6 if dtype == torch.float32 else 8e-3), (seed, found, bits, counts, shape, group, dtype, stored)
    assert (out[:, 1::2] == 7).all()
print("all the same")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from coterie.experts.kernels.triton_grouped import _grouped, blocks

constants = {"GROUP": 64, "HAS_ROW": True, "HAS_ZERO": True, "WIDEN": False, **blocks(40, 2048)}
types = {name: "constexpr" if name in constants else "i32" for name in _grouped.arg_names}
types |= {"x": "*bf16", "row": "*i64", "y": "*fp32", "task": "*i64", "expert": "*i64", "words": "*i32"}
types |= {"scale": "*bf16", "zero": "*bf16", "plain": "*bf16"}
source = ASTSource(_grouped, signature=types, constexprs=constants)
assert "mma" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
print("compiled")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("code", "said", "interpret"), [(INTERPRETED, "all the same", "1"), (COMPILED, "compiled", "0")]
)
def test_the_gpu_kernel_gives_the_same_and_compiles_for_a_gpu_that_is_not_here(code, said, interpret, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_on_a_gpu_are_those_on_the_cpu(dtype):
    s = stack([2, 3, 4, 8, PLAIN], (768, 2048), 64, dtype=torch.bfloat16)
    x, counts = torch.randn(60, 2048).to(dtype), [1, 0, 20, 30, 9]
    parts = [None if t is None else t.cuda() for t in (s.words, s.scale_QOG, s.zero_QOG, s.plain)]
    y = kernels.grouped(Stack(s.bits, s.shape, s.group, *parts), x.cuda(), counts)
    assert error(y.cpu(), s, x, counts) < (1e-6 if dtype == torch.float32 else 8e-3)


def test_without_triton_torch_multiplies_on_a_gpu_and_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "coterie.experts.kernels.triton_grouped", raising=False)
    kernels._triton.cache_clear()
    with pytest.warns(UserWarning, match="Install triton"):
        assert kernels._triton() is None
    kernels._triton.cache_clear()


# ---- whole layers


def filled(family, symmetric=False, **changes):
    """A tiny model whose experts are packed, mixed widths in every layer."""
    model = tiny(family, **changes)
    model.set_experts_implementation("coterie")
    layers = list(moe_layers(model))
    forms = {}
    for layer in layers:
        shapes = projection_shapes(layer.bank)
        choice = [1, 2, 3, 4, 8, PLAIN]
        widths = {p: [choice[(e + i) % 6] for e in range(layer.num_experts)] for i, p in enumerate(shapes)}
        forms[layer.index] = Form(bits=ExpertBits(group=24, symmetric=symmetric, **widths))
    apply_forms(model, forms)
    for layer in layers:
        for p, shape in layer.experts.packed_shapes.items():
            dtype = getattr(layer.experts, f"plain_{p}").dtype
            s = stack(layer.experts.packed_bits[p], shape, 24, symmetric=symmetric, dtype=dtype, seed=layer.index)
            parts = {"packed": s.words, "scale": s.scale_QOG * 0.3, "zero": s.zero_QOG, "plain": s.plain * 0.1}
            for part, value in parts.items():
                if value is not None:
                    getattr(layer.experts, f"{part}_{p}").data.copy_(value)
    return model


@contextlib.contextmanager
def torch_only(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "usable", lambda *_: False)
        yield


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("family", FEW)
def test_packed_models_have_the_logits_of_the_torch_path(family, symmetric, monkeypatch):
    model = filled(family, symmetric)
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(ids).logits
        with torch_only(monkeypatch):
            assert torch.allclose(model(ids).logits, logits, atol=2e-5)


@pytest.fixture
def layer():
    """The experts of one packed layer."""
    return next(iter(moe_layers(filled("gpt-oss")))).experts


def routed(module, tokens=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    E, H = module.stored_experts, module.packed_shapes["down"][0]
    index = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(tokens)])
    return torch.randn(tokens, H, generator=generator), index, torch.rand(tokens, 2, generator=generator)


def test_rows_are_taken_in_turns_without_changing_the_sum(layer, monkeypatch):
    x, index, weight = routed(layer, 300)
    whole = layer(x, index, weight)
    monkeypatch.setattr(packed, "_NUMBERS", 1)  # 64 rows at a time
    assert torch.allclose(layer(x, index, weight), whole, atol=1e-5)


def test_turns_cover_every_row_once():
    counts = [0, 70, 3, 0, 64, 200]
    turns = list(packed.spans(counts, 64))
    assert [sum(some) for _, some in turns] == [64, 64, 64, 64, 64, 17]
    assert [start for start, _ in turns] == [0, 64, 128, 192, 256, 320]
    assert [sum(column) for column in zip(*(some for _, some in turns))] == counts


def test_gradients_of_inputs_and_weights_are_those_of_the_torch_path(layer, monkeypatch):
    x, index, weight = routed(layer)

    def gradients():
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        layer(leaves[0], index, leaves[1]).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    ours = gradients()
    with torch_only(monkeypatch):
        for mine, other in zip(ours, gradients(), strict=True):
            assert other.abs().max() > 0
            assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4)


def test_no_expert_adds_nothing(layer):
    x, index, weight = routed(layer)
    index[3] = layer.stored_experts
    y = layer(x, index, weight)
    assert (y[3] == 0).all()
    assert (y[2] != 0).any()


def test_slots_reroute_packed_experts(layer):
    x, index, weight = routed(layer)
    other = (index + 1) % layer.stored_experts
    with rerouted(layer, lambda index, weight: (other, weight)):
        changed = layer(x, index, weight)
    assert torch.equal(changed, layer(x, other, weight))
    assert not torch.allclose(changed, layer(x, index, weight))


def test_a_tap_sees_every_packed_expert(layer):
    class Tap:
        seen = 0

        def routed(self, x_TH, index_TK, weight_TK):
            return True

        def expert(self, expert, row_R, x_RH, y_RH):
            self.seen += len(row_R)

        def combined(self, sum_TH):
            self.sum_TH = sum_TH

    x, index, weight = routed(layer)
    tap = Tap()
    with observe(layer, tap):
        layer(x, index, weight)
    assert tap.seen == index.numel()
    assert torch.allclose(tap.sum_TH, layer(x, index, weight), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_linear_layers_multiply_in_the_kernel_and_answer_in_the_dtype_they_were_asked_in(dtype, monkeypatch):
    model = tiny(FEW[0], dtype)
    path = next(n for n, m in model.named_modules() if n.endswith("q_proj"))
    module = model.get_submodule(path)
    shape = tuple(module.weight.shape)
    apply_linears(model, Linears(group=16, symmetric=False, bits={path: 3}))
    s = stack([3], shape, 16, dtype=dtype)
    module.packed.copy_(s.words.view_as(module.packed))
    module.scale.data.copy_(s.scale_QOG[0])
    module.zero.data.copy_(s.zero_QOG[0])
    x = torch.randn(2, 5, shape[1]).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert y.shape == (2, 5, shape[0])
    with torch_only(monkeypatch):
        assert torch.allclose(module(x), y, rtol=0.02, atol=0.02 if dtype != torch.float32 else 1e-5)


# ---- the library


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine that has not built the kernel yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.kernel.cache_clear()
    yield tmp_path / "coterie" / "kernels"
    cpu.kernel.cache_clear()


@pytest.mark.parametrize(("compiler", "told"), [("no-such-compiler", "no C compiler"), ("false", "failed")])
def test_without_a_compiler_torch_multiplies_and_it_is_said_once(compiler, told, fresh, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    s, x = stack([3, 5], (7, 40), 16), torch.randn(3, 40)
    with pytest.warns(UserWarning, match=told) as caught:
        first = kernels.grouped(s, x, [1, 2])
    assert "apt-get install gcc" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(kernels.grouped(s, x, [1, 2]), first)
    assert torch.equal(first, kernels.reference(s, x, [1, 2]))
    assert not list(fresh.glob("*"))


@pytest.mark.parametrize("damage", [lambda content: content[:3000], lambda content: b"x" + content[1:], lambda _: b""])
def test_a_damaged_library_is_built_again(damage, fresh):
    build.library(PORTABLE)
    (file,) = fresh.iterdir()
    content = file.read_bytes()
    file.unlink()  # what this process has open stays whole
    file.write_bytes(damage(content))
    build.library(PORTABLE)
    assert file.read_bytes() == content
    assert list(fresh.iterdir()) == [file]


def test_a_library_in_the_cache_is_not_built_again(fresh, monkeypatch):
    build.library(PORTABLE)
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    build.library(PORTABLE)


def test_another_processor_or_other_options_make_another_library(fresh, monkeypatch):
    build.library(PORTABLE)
    build.library((*PORTABLE, "-DOTHER"))
    monkeypatch.setattr(build, "_processor", lambda: "another")
    build.library(PORTABLE)
    assert len(list(fresh.iterdir())) == 3


def test_processes_that_start_together_all_get_a_whole_library(fresh):
    code = f"import runpy; runpy.run_path({build.__file__!r})['library'](('-O1', '-shared', '-fPIC'))"
    started = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        assert process.wait() == 0, process.stderr.read()
    assert len(list(fresh.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "coterie").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.library(PORTABLE).coterie_threaded() in (0, 1)


def test_the_source_is_part_of_the_package():
    assert build.SOURCE.is_file()
    assert Path(coterie.__file__).parent in build.SOURCE.parents
