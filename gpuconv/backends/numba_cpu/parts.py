"""Functions that kernels are made of: typed and lowered once, optimised and made machine code with each kernel.

Of a function that another one calls, Numba first makes machine code, for it might be run, and links it, optimised, into
its caller, where it is optimised again. No part of a kernel is ever run on its own. Linked as it was lowered, it spares
a kernel a third, or more, of the time that it takes to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import _dynfunc, njit
from numba.core import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering

from gpuconv.backends.numba_cpu.kernel_cache import alone


class _PartLibrary(JITCodeLibrary):  # type: ignore[misc]
    """A module to link into others. It is not optimised, and the engine that makes machine code never sees it."""

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(NativeLowering):  # type: ignore[misc]
    """Numba's, as far as LLVM IR."""

    _name = "gpuconv_part_lowering"

    def run_pass(self, state: Any) -> bool:
        library = state.library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        library.enable_object_caching()
        state.flags.no_compile = True
        super().run_pass(state)
        lowered = state["cr"]
        # By this object without code Numba finds the module, when it lowers a call of the part.
        name = lowered.fndesc.qualname.split(".")[-1]
        key = _dynfunc.make_function(lowered.fndesc.lookup_module(), name, "", 0, lowered.env, (library,))
        state.targetctx.insert_user_function(key, lowered.fndesc, [library])
        state["cr"] = lowered._replace(cfunc=key)
        return True


class _PartCompiler(CompilerBase):  # type: ignore[misc]
    def define_pipelines(self) -> list[Any]:
        builder = DefaultPassBuilder.define_nopython_pipeline(self.state)
        builder.passes = [(_PartLowering if made is NativeLowering else made, why) for made, why in builder.passes]
        builder.finalize()
        return [builder]


def compiled(function: Callable[..., Any]) -> Any:
    """A function for other compiled functions to call: of integers, without Python's errors of integer division."""
    signature = (types.intp,) * function.__code__.co_argcount
    make = njit(
        [signature], pipeline_class=_PartCompiler, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
    )
    return make(alone(function))
