"""Untrusted data is never run, nothing is written to disk, and other libraries' arrays are taken or refused by rule."""

from __future__ import annotations

import ast
import os
import pickle
import stat
from pathlib import Path

import calls
import numpy as np
import pytest

import gpuconv
from gpuconv.filters import kernel_from

PACKAGE = Path(gpuconv.__file__).parent
pytestmark = pytest.mark.skipif(
    any(os.environ.get(name) == "1" for name in ("NUMBA_ENABLE_CUDASIM", "GPUCONV_TEST_FAKE_CUPY")),
    reason="this process is a child itself",
)
posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes of files are POSIX")

# ---- no data is run as code

CODE_FROM_DATA = {
    "eval", "exec", "compile", "__import__", "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle",
    "joblib", "yaml", "runpy",
}  # fmt: skip
# Other programs, other machines, and folders that other users write to.
OUTSIDE = {"subprocess", "system", "popen", "socket", "urllib", "http", "requests", "tempfile", "gettempdir", "mkdtemp"}


# gpuconv's own compiled kernels, and only those, are read back as code, from a folder that is this user's alone.
ALLOWED = {
    "backends/numba_cpu/kernel_cache.py": {"pickle", "tempfile"},
    # Numba's method of a kernel, not Python's function.
    "backends/numba_cpu/runtime.py": {"compile"},
    "backends/numba_cuda/launch.py": {"compile"},
    "backends/numba_cuda/replay.py": {"compile"},
}


def offences(source: str) -> list[str]:
    """The lines of ``source`` that could run data, start a program, open a connection or use a shared folder."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute) and not (node.attr == "compile" and _is_name(node.value, "re")):
            names = [node.attr]
        wrong = [name for name in names if name in CODE_FROM_DATA | OUTSIDE]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("/tmp"):
            wrong.append(node.value)
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            trusts = given.get("allow_pickle")
            if trusts is not None and not (isinstance(trusts, ast.Constant) and trusts.value is False):
                wrong.append("allow_pickle")
            of_numpy = _is_name(getattr(node.func, "value", None), "np")
            if trusts is None and (name == "read_array" or (name == "load" and of_numpy)):
                wrong.append(f"{name} without allow_pickle=False")
            if name == "import_module" and not _is_ours(node.args[0]):
                wrong.append("import_module of a name that is not ours")
        found += [f"line {node.lineno}: {name}" for name in wrong]
    return found


def _is_name(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_ours(node: ast.expr) -> bool:
    """A constant, or an f-string that begins with this package's name."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) else node
    whole = isinstance(node, ast.Constant)
    return isinstance(first, ast.Constant) and (whole or str(first.value).startswith("gpuconv."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_runs_data(path):
    allowed = ALLOWED.get(path.relative_to(PACKAGE).as_posix(), set())
    found = offences(path.read_text(encoding="utf-8"))
    assert not [offence for offence in found if offence.rpartition(" ")[2] not in allowed]


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)", "exec(text)", "compile(text, '', 'exec')", "import pickle", "from pickle import loads",
        "np.load(path)", "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=trusted)", "__import__(name)",
        "np.lib.format.read_array(file)", "importlib.import_module(name)", "importlib.import_module(f'{name}.x')",
        "os.system(text)", "subprocess.run(text)", "tempfile.mkdtemp()", "open('/t" "mp/kernel.so')",
        "import numpy.f2py, marshal", "builtins.eval(text)",
    ],
)  # fmt: skip
def test_the_check_has_teeth(line):
    assert offences(line)


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple:
        return exec, (f"open({self.target!r}, 'w').close()",)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".txt", ".csv", ".json", ".pkl"])
def test_pickles_are_not_read(suffix, tmp_path):
    target, path = tmp_path / "was run", tmp_path / f"kernel{suffix}"
    array = np.empty((1, 1), object)
    array[0, 0] = Payload(target)
    with path.open("wb") as file:  # np.save would add a suffix
        np.save(file, array)
    for content in (path.read_bytes(), pickle.dumps(array), pickle.dumps(array, 0)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"kernel file .*{path.name}"):
            kernel_from(str(path))
    assert not target.exists()
    np.load(path.with_suffix(".npy") if suffix == ".npy" else path, allow_pickle=True)
    assert target.exists(), "the payload would not have done anything"


AUDIT = """
import os, sys
events = []
def hook(event, arguments):
    if not watching:
        return
    if event == "open":
        path, mode, flags = arguments
        if not (set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
    wanted = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.chmod",
              "os.chown", "os.truncate", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.startfile",
              "shutil.", "tempfile.", "subprocess.", "socket.", "urllib.", "webbrowser.", "ctypes.dlopen",
              "pickle.", "marshal.load") + extra
    if event.startswith(wanted):
        events.append((event, str(arguments)[:200]))
watching, extra = False, ()
sys.addaudithook(hook)
"""

HOSTILE = """
import numpy as np
import gpuconv
words = ["__import__('os').system('true')", "os.system", "../../secrets", "numpy.gemm; import os", "${HOME}", "%s%n",
         "{0.__class__}", "cuda:0x1", "cuda:" + "9" * 30, "a" * 100_000, "numpy.gemm\\0",
         "n1c1h5w5_o1kh3kw3_" + "s1" * 5000,
         "n" + "1" * 10_000 + "c1h5w5_o1kh3kw3_f32", "n1c1h5w5_o1kh3kw3_fill" + "1" * 99 + "_f32", "_" * 50_000,
         "\\ud800", "n1c1h5w5_o1kh3kw3_p" + "1." * 40_000 + "1_f32", "l4,i4", "O", "{'a': 1}"]
names = ["padding", "padding_mode", "layout", "kernel_layout", "activation", "dtype", "precision", "device", "backend",
         "stride", "dilation", "groups", "padding_value", "x_zero_point", "k_zero_point", "workspace_limit", "stream",
         "bias", "out"]
x = k = np.ones((1, 1, 3, 3), np.float32)
def attempt(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except (ValueError, TypeError) as error:
        assert str(error).startswith(call.__name__ + ": "), error
    else:
        raise AssertionError((call, arguments, options))
def all_of_them():
    for word in words:
        attempt(gpuconv.explain, word)
        attempt(gpuconv.conv2d, word, k)
        attempt(gpuconv.conv2d, x, word)
        for name in names:
            attempt(gpuconv.conv2d, x, k, **{name: word})
all_of_them()  # imports what there is to import
watching, extra = True, ("exec", "import")
all_of_them()
watching = False
assert not events, events
"""


def test_hostile_words_are_refused_by_name_and_nothing_else():
    """As any argument: no file, program, module or connection is opened, and no code runs."""
    calls.child(AUDIT + HOSTILE, limit=60)


# ---- nothing is written

EVERYTHING = """
import calls, gpuconv
few = [name for name in calls.usable("cpu") if name in ("numba_cpu.strip", "numpy.gemm", "numpy.patches")]
todo = calls.jobs(few, ("float32",))  # few kernels: the child compiles its own
assert calls.run_all((call, options) for call, options in todo if options) >= 10
gpuconv.explain((1, 3, 9, 9), (4, 3, 3, 3), device="cuda"), gpuconv.info(), gpuconv.clear()
gpuconv.trace([[1, 2], [3, 4]], [[1]])
"""

# One kernel, compiled anew in each child that has no cache.
ONE_KERNEL = """
import numpy as np, gpuconv
assert gpuconv.conv2d(np.ones((9, 9), np.float32), np.ones((3, 3), np.float32))[0, 0] == 9
"""
# What starts kernels is kept as they are, and compiles in half a second.
SMALLEST = """
from gpuconv.backends.numba_cpu import runtime
assert runtime.starter(False)
"""


class Places:
    """A user's folders, all of them new and empty, for a child process."""

    def __init__(self, root: Path, cache: Path | None = None) -> None:
        self.home, self.temporary, self.here, self.cache = (root / name for name in ("home", "tmp", "cwd", "cache"))
        for folder in (self.home, self.temporary, self.here):
            folder.mkdir(mode=0o700)
        self.environment = dict.fromkeys(("HOME", "USERPROFILE"), str(self.home))
        self.environment |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self.temporary))
        for name, folder in {
            "XDG_CACHE_HOME": ".cache",
            "XDG_CONFIG_HOME": ".config",
            "LOCALAPPDATA": "AppData",
        }.items():
            self.environment[name] = str(self.home / folder)
        self.cache = cache or self.cache
        self.environment["GPUCONV_CACHE_DIR"] = str(cache or "")  # which is none, whatever this process was told

    def run(self, script: str) -> None:
        """Where new files are open to everyone unless their maker says otherwise."""
        compiled = set(PACKAGE.rglob("*.nb[ic]"))
        calls.child(f"import os; os.chdir({str(self.here)!r}); os.umask(0)\n{script}", **self.environment)
        assert set(PACKAGE.rglob("*.nb[ic]")) == compiled, "compiled code beside the sources"


def written(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_convolving_writes_nothing_but_its_cache(tmp_path):
    places = Places(tmp_path)
    watched = AUDIT + EVERYTHING + "watching = True\n" + EVERYTHING
    watched += (
        "watching = False\nassert not [event for event in events if event[0] not in ('import', 'exec')], events\n"
    )
    places.run(watched)
    assert not [*written(places.temporary), *written(places.here)]
    # The first time compiled code is kept; that is all there is at home, and it is this user's alone.
    cache = [path for path in written(places.home) if path.is_file()]
    assert {(path.parent.name, path.suffix) for path in cache} == {("gpuconv", ".kernel")}, cache
    if os.name == "posix":
        for made in places.home.iterdir():
            check_private(made)


def check_private(folder: Path) -> None:
    """``folder`` and all in it belong to this user, and no one else reads or writes there."""
    for path in (folder, *written(folder)):
        facts = path.lstat()
        assert not stat.S_ISLNK(facts.st_mode), f"{path} is a link"
        assert facts.st_uid == os.geteuid(), f"{path} belongs to another user"
        assert facts.st_mode & 0o077 == 0, f"{path} has mode {facts.st_mode & 0o777:o}"


# Compiled code is the one thing that gpuconv keeps on disk: in GPUCONV_CACHE_DIR where that is set, else below the
# user's own cache folder; made with mode 0700; and nothing is read from or written to a folder that is not this user's,
# that others can write to, or that is reached through a link of someone else.


@posix
def test_a_chosen_cache_of_compiled_code_is_private(tmp_path):
    places = Places(tmp_path, tmp_path / "chosen")
    places.run(ONE_KERNEL + SMALLEST)
    assert not [*written(places.temporary), *written(places.here)], "a cache in a shared or current folder"
    assert not written(places.home), "GPUCONV_CACHE_DIR was not honoured"
    assert {path.name.partition("-")[0] for path in written(places.cache)} >= {"alone"}, "nothing was kept"
    check_private(places.cache)


@posix
@pytest.mark.parametrize("fault", ["open to all", "open to the group", "another user's", "a link to an open folder"])
def test_a_cache_folder_that_is_not_private_is_not_used(fault, tmp_path):
    real = cache = tmp_path / "chosen"
    real.mkdir(mode=0o700)
    if fault == "open to all":
        real.chmod(0o777)
    elif fault == "open to the group":
        real.chmod(0o770)
    elif fault == "another user's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(real, 65534, 65534)
    else:
        real.chmod(0o777)
        cache = tmp_path / "link"
        cache.symlink_to(real)
    before = real.stat().st_mode
    Places(tmp_path, cache).run(SMALLEST)
    assert not written(real), "compiled code where others can change it"
    assert real.stat().st_mode == before, "another's folder was changed"


@posix
def test_no_cache_folder_can_be_had(tmp_path):
    """No home, and a file where the cache should be: everything still computes."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    places = Places(tmp_path, blocked)
    places.environment |= dict.fromkeys(("HOME", "XDG_CACHE_HOME"), str(blocked / "missing"))
    places.run(ONE_KERNEL)
    assert blocked.read_text() == ""


# ---- __cuda_array_interface__

INTERFACE = """
import fake_cupy, sys
from types import SimpleNamespace
import numpy as np
from gpuconv import conv2d
cupy = sys.modules["cupy"]

class OnGpu(np.ndarray):
    "Host memory that says it is on GPU 0, as a CuPy array does."
    device = SimpleNamespace(id=0)
    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))

class Interface:
    "Nothing but the protocol, over the memory of ``array``."
    def __init__(self, array, **changes):
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": array.dtype.str, "data": (array.ctypes.data, False), "version": 3,
            "strides": None if array.flags.c_contiguous else array.strides,
        } | changes

def asarray(value, blocking=False):
    "As CuPy reads the protocol, and with its words."
    if isinstance(value, np.ndarray):
        return value
    facts = value.__cuda_array_interface__
    dtype = np.dtype(facts["typestr"])
    if facts["typestr"][0] == ">":
        raise ValueError("CuPy does not support the big-endian byte-order")
    if facts.get("mask") is not None:
        raise ValueError("CuPy currently does not support masked arrays.")
    if not np.prod(facts["shape"]):
        array = np.empty(facts["shape"], dtype)
    else:
        memory = value.array
        assert memory.ctypes.data == facts["data"][0]
        array = np.lib.stride_tricks.as_strided(memory, facts["shape"], facts.get("strides") or memory.strides)
    return array.view(OnGpu)

cupy.asarray = asarray
stream = SimpleNamespace(ptr=0)
cupy.cuda.get_current_stream = lambda: stream

X = np.random.default_rng(3).integers(-9, 9, (2, 3, 6, 7)).astype(np.float32)
K = np.random.default_rng(4).integers(-9, 9, (8, 3, 3, 2)).astype(np.float32)
B = np.arange(8, dtype=np.float32)
wanted = conv2d(X, K, B, device="cpu")

def refused(kind, start, *arguments, **options):
    try:
        conv2d(*arguments, **options)
    except kind as error:
        assert str(error).startswith(start), error
    else:
        raise AssertionError("was accepted")
"""


def stand_in(script: str) -> None:
    calls.child(INTERFACE + script, GPUCONV_TEST_FAKE_CUPY="1")


def test_interface_strides():
    """None, and left out, mean C order; given ones may be of any sign and order."""
    stand_in("""
forms = {"strides=None": Interface(X), "strides": Interface(X, strides=X.strides)}
bare = Interface(X)
del bare.__cuda_array_interface__["strides"]
forms["no strides"] = bare
forms["stream"] = Interface(X, stream=None)
turned = X.transpose(3, 2, 1, 0).copy().transpose(3, 2, 1, 0)
forms["transposed"] = Interface(turned)
forms["reversed"] = Interface(X[:, :, ::-1, ::-1].copy()[:, :, ::-1, ::-1])
for text, x in forms.items():
    y = conv2d(x, Interface(K), Interface(B))
    assert np.array_equal(y, wanted), text
""")


def test_interface_of_no_elements():
    """A null pointer stands for the memory of an array without elements; no address is made of it."""
    stand_in("""
empty = lambda *shape: Interface(np.empty(shape, np.float32), data=(0, False))
assert conv2d(empty(0, 3, 6, 7), K).shape == (0, 8, 4, 6)
assert conv2d(empty(0, 3, 6, 7), Interface(K), Interface(B), padding=1).shape == (0, 8, 6, 8)
y = conv2d(empty(2, 0, 5, 5), empty(8, 0, 3, 3), Interface(B))
assert np.array_equal(y, np.broadcast_to(B.reshape(-1, 1, 1), (2, 8, 3, 3)))
assert not conv2d(empty(2, 0, 5, 5), empty(8, 0, 3, 3)).any()
assert not conv2d(empty(1, 3, 0, 5), K, padding=2).any()
out = empty(0, 8, 4, 6)
assert conv2d(empty(0, 3, 6, 7), K, out=out) is out
refused(ValueError, "conv2d: k ", Interface(X), empty(0, 3, 3, 3))
refused(ValueError, "conv2d: k ", Interface(X), empty(8, 3, 0, 3))
refused(ValueError, "conv2d: out ", Interface(X), Interface(K), out=empty(0, 8, 4, 6))
""")


def test_interface_that_is_read_only():
    stand_in("""
for array in (X, K, B):
    array.flags.writeable = False
frozen = [Interface(array, data=(array.ctypes.data, True)) for array in (X, K, B)]
assert np.array_equal(conv2d(*frozen), wanted)
memory = np.full(wanted.shape, 77, np.float32)
out = Interface(memory, data=(memory.ctypes.data, True))
refused(ValueError, "conv2d: out is read-only", *frozen, out=out)
assert (memory == 77).all(), "it was written to"
out = Interface(memory)
assert conv2d(*frozen, out=out) is out and np.array_equal(memory, wanted)
""")


def test_interface_of_memory_that_is_not_aligned():
    """Its first use would end every later call of the process, so it is refused before."""
    stand_in("""
for name, array in {"x": X, "k": K, "bias": B, "out": wanted}.items():
    odd = np.zeros(array.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(array.shape)
    operands = {"x": Interface(X), "k": Interface(K), "bias": Interface(B)} | {name: Interface(odd)}
    refused(ValueError, f"conv2d: {name} is not aligned", **operands)
""")


def test_interface_of_masked_elements():
    stand_in("""
mask = Interface(np.zeros((2, 3), bool))
operands = {"x": X, "k": K, "bias": B, "out": np.full_like(wanted, 77)}
for name in operands:
    given = {key: Interface(array, **({"mask": mask} if key == name else {})) for key, array in operands.items()}
    refused(TypeError, f"conv2d: {name} ", **given)
    assert (operands["out"] == 77).all()
""")


def test_interface_in_another_byte_order():
    stand_in("""
for name, array in {"x": X, "k": K, "bias": B}.items():
    operands = {"x": Interface(X), "k": Interface(K), "bias": Interface(B)} | {name: Interface(array.astype(">f4"))}
    refused((TypeError, ValueError), f"conv2d: {name} ", **operands)
""")


@pytest.mark.gpu
def test_interface_on_a_gpu():
    """What CuPy itself makes of the same objects."""
    import cupy

    class Interface:
        def __init__(self, array, **changes):
            self.array = array
            self.__cuda_array_interface__ = array.__cuda_array_interface__ | changes

    rng = np.random.default_rng(3)
    x, k = rng.integers(-9, 9, (2, 3, 6, 7)).astype(np.float32), rng.integers(-9, 9, (8, 3, 3, 2)).astype(np.float32)
    wanted = gpuconv.conv2d(x, k, device="cpu")
    on_x, on_k, empty = cupy.asarray(x), cupy.asarray(k), cupy.empty((0, 3, 6, 7), cupy.float32)
    for given in (Interface(on_x), Interface(on_x, strides=on_x.strides), Interface(on_x, data=(on_x.data.ptr, True))):
        assert np.array_equal(gpuconv.conv2d(given, Interface(on_k)).get(), wanted)
    assert gpuconv.conv2d(Interface(empty, data=(0, False)), on_k).shape == (0, 8, 4, 6)
    out = cupy.full(wanted.shape, 77, cupy.float32)
    with pytest.raises(ValueError, match="out is read-only"):
        gpuconv.conv2d(on_x, on_k, out=Interface(out, data=(out.data.ptr, True)))
    with pytest.raises(ValueError, match=r"k .*not aligned"):
        gpuconv.conv2d(on_x, Interface(on_k[:1], data=(on_k.data.ptr + 1, False)))
    assert (out == 77).all()


@pytest.mark.gpu
def test_interface_of_masked_elements_on_a_gpu():
    import cupy

    class Masked:
        def __init__(self, array, mask):
            self.array = array
            self.__cuda_array_interface__ = array.__cuda_array_interface__ | {"mask": mask}

    x = cupy.ones((4, 4), cupy.float32)
    with pytest.raises(TypeError, match=r"^conv2d: x .*mask"):
        gpuconv.conv2d(Masked(x, cupy.zeros((4, 4), bool)), [[1]])
