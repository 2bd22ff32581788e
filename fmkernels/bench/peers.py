"""Other ways to run the same module: torch.compile, ONNX Runtime, OpenVINO, and for attention each
kernel that PyTorch chooses from, and flash-attn. Each is optional.

A peer that is not installed, or cannot run a problem, raises :class:`PeerUnavailable` with the
reason, which the report shows in its row. All get the thread count that PyTorch has.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmkernels.bench.candidates import Candidate, Problem, module_candidate
from fmkernels.bench.flash_attention import FlashAttention, Refused


class PeerUnavailable(RuntimeError):
    """This peer cannot run this problem here; the message says why."""


def compiled(problem: Problem) -> Candidate:
    """torch.compile with inductor; for inference with freezing, which packs weights and fuses."""
    torch._dynamo.reset()
    module = copy.deepcopy(problem.module)
    layout = problem.workload.layouts[-1]
    inference = problem.mode == "inference"
    candidate = module_candidate("compile", problem, module, layout, run=torch.compile(module))
    # Freezing is decided when the first call compiles.
    with torch._inductor.config.patch(freezing=inference), _quiet():
        try:
            candidate.call()
        except Exception as error:
            raise PeerUnavailable(f"torch.compile failed: {_first_line(error)}") from error
    return candidate


def onnxruntime(problem: Problem) -> Candidate:
    """ONNX Runtime on the CPU, from torch's dynamo-based exporter."""
    _inference_fp32_only(problem)
    runtime = _need("onnxruntime")
    _need("onnxscript")
    with _quiet():
        try:
            program = torch.onnx.export(problem.module, problem.inputs, dynamo=True)
            model = program.model_proto.SerializeToString()
        except Exception as error:
            raise PeerUnavailable(f"ONNX export failed: {_first_line(error)}") from error
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise PeerUnavailable(f"ONNX Runtime refused the model: {_first_line(error)}") from error
    names = [value.name for value in session.get_inputs()]
    feed = dict(zip(names, (tensor.numpy() for tensor in problem.inputs), strict=True))
    return _array_candidate("onnxruntime", lambda: session.run(None, feed))


def openvino(problem: Problem) -> Candidate:
    """OpenVINO on the CPU, converted from the traced module, in fp32 throughout."""
    _inference_fp32_only(problem)
    ov = _need("openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # On processors with bf16 arithmetic OpenVINO would otherwise compute in it.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with _quiet():
        try:
            model = ov.convert_model(copy.deepcopy(problem.module), example_input=problem.inputs)
            for port, tensor in zip(model.inputs, problem.inputs, strict=True):
                port.get_node().set_partial_shape(ov.PartialShape(list(tensor.shape)))
            model.validate_nodes_and_infer_types()
            request = ov.compile_model(model, "CPU", settings).create_infer_request()
        except Exception as error:
            raise PeerUnavailable(f"OpenVINO refused the model: {_first_line(error)}") from error
    arrays = [tensor.numpy() for tensor in problem.inputs]

    def call():
        return list(request.infer(arrays, share_inputs=True, share_outputs=True).values())

    return _array_candidate("openvino", call)


def sdpa(name: str, backend: SDPBackend, problem: Problem) -> Candidate:
    """PyTorch, its attention by one of the kernels that "eager" chooses from."""
    module = copy.deepcopy(problem.module)

    def run(*inputs):
        with sdpa_kernel(backend):
            return module(*inputs)

    candidate = module_candidate(name, problem, module, run=run)
    # Why PyTorch finds that a kernel cannot serve is in its warnings.
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        try:
            candidate.call()
        except RuntimeError as error:
            texts = [_first_line(error), *(str(reason.message) for reason in reasons)]
            raise PeerUnavailable("; ".join(texts)[:300]) from error
    return candidate


def flash_attn(problem: Problem) -> Candidate:
    """The package flash-attn, on attention alone."""
    package = _need("flash_attn")
    mask = problem.inputs[3] if len(problem.inputs) > 3 else None
    try:
        module = FlashAttention(package, problem.module, mask)
        candidate = module_candidate("flash-attn", problem, module)
        candidate.call()
    except Refused as error:
        raise PeerUnavailable(f"flash-attn: {error}") from error
    except Exception as error:
        raise PeerUnavailable(f"flash-attn refused it: {_first_line(error)}") from error
    return candidate


_SDPA = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
}

# Of the attention family alone: name -> how to build it.
ATTENTION_PEERS: dict[str, Callable[[Problem], Candidate]] = {
    **{name: partial(sdpa, name, backend) for name, backend in _SDPA.items()},
    "flash-attn": flash_attn,
}

# Name -> how to build it. "eager" is not here: it is always measured.
PEERS: dict[str, Callable[[Problem], Candidate]] = {
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    **ATTENTION_PEERS,
}

# Who is measured on a device unless the caller says otherwise.
DEFAULT = {"cpu": ("eager",), "cuda": ("eager", "compile", *ATTENTION_PEERS)}


def _array_candidate(name: str, call: Callable[[], list]) -> Candidate:
    def tensors():
        return {f"output {i}": torch.tensor(array) for i, array in enumerate(call())}

    return Candidate(name, "contiguous", call, tensors)


def _inference_fp32_only(problem: Problem) -> None:
    if problem.mode != "inference":
        raise PeerUnavailable("inference only")
    if problem.dtype != "fp32":
        raise PeerUnavailable("compared in fp32 only")


def _need(package: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise PeerUnavailable(f"{package} is not installed") from error


@contextlib.contextmanager
def _quiet():
    """Exporters and compilers talk on every channel; a progress bar is being drawn meanwhile."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
