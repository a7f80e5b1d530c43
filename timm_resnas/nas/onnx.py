"""Networks as ONNX graphs, and sessions of ONNX Runtime that run them.

The graph is what torch.onnx's exporter over torch.export writes: any batch size, and each node with the names of the
modules that it comes from. The packages onnx, onnxscript and onnxruntime are the extra ``export``; they are imported
when something here is called.

>>> model = timm.create_model("vit_tiny_patch16_224").eval()
>>> proto = to_onnx(model, torch.zeros(2, 3, 224, 224))
>>> session = open_session(proto.SerializeToString(), num_threads=1)
>>> (logits,) = session.run(None, {INPUT: images})  # float32 [B, 3, 224, 224] -> [B, 1000]
"""

from __future__ import annotations

import ast
import importlib
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    import onnx
    import onnxruntime

__all__ = [
    "CPU_PROVIDER",
    "INPUT",
    "OUTPUT",
    "ExportError",
    "open_session",
    "package",
    "scopes",
    "to_onnx",
    "to_program",
]

INPUT, OUTPUT = "images", "logits"
CPU_PROVIDER = "CPUExecutionProvider"
_SCOPES = "pkg.torch.onnx.name_scopes"
_ANY_BATCH = ({0: torch.export.Dim("batch")},)
_MAX_BYTES = 2**31 - 2**20  # of weights; a protobuf message is smaller than 2 GiB


class ExportError(ValueError):
    """A network cannot be exported; the message says why."""


def package(name: str) -> Any:
    """A package of the extra ``export``.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as err:
        raise ImportError(f"ONNX needs the package {name} ({err}); pip install 'timm_resnas[export]'") from err


def to_onnx(model: nn.Module, images: torch.Tensor, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The ONNX graph of a model in evaluation, for any batch size: `INPUT` [B, C, H, W] -> `OUTPUT` [B, num_classes].

    Of what the exporter notes beside the nodes, the names of modules stay (`scopes`); paths of source files do not.

    Args:
        model: Gives one tensor; it is put in eval mode.
        images: An example of its input, with a batch of at least 2.
        metadata: Texts by name that readers of the file find (``session.get_modelmeta().custom_metadata_map``).

    Raises:
        ExportError: The exporter refuses the model, or it is larger than an ONNX file can be.
        ImportError: onnx or onnxscript is not installed.
    """
    for name in ("onnx", "onnxscript"):
        package(name)
    if len(images) < 2:
        raise ExportError(f"a graph for any batch size is traced with a batch of at least 2, got {len(images)}")
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size > _MAX_BYTES:
        raise ExportError(f"the model has {size / 2**30:.1f} GiB of weights, an ONNX file holds less than 2")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the exporter's parts say of each other
            program = torch.onnx.export(
                model.eval(),
                (images,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=_ANY_BATCH,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as e:
        raise ExportError(f"torch.onnx cannot export a {type(model).__name__}: {_cause(e)}") from e
    assert program is not None  # it is where no file is given
    proto = program.model_proto
    if not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ExportError(
            f"torch {torch.__version__} exports a {type(model).__name__} for {len(images)} images at a time only; the "
            f"model fixes the number, or this torch is too old (2.6 is, 2.14 is not)"
        )
    for node in proto.graph.node:
        kept = [p for p in node.metadata_props if p.key == _SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        del value.metadata_props[:]
    for key, text in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=text)
    return proto


def to_program(model: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    """The program of torch.export of a model, for any batch size.

    Args:
        model: In the mode that is exported.
        images: An example of its input, with a batch of at least 2.

    Raises:
        ExportError: torch.export refuses the model.
    """
    try:
        return torch.export.export(model, (images,), dynamic_shapes=_ANY_BATCH)
    except Exception as e:  # of many kinds, what the model's own code raises among them
        raise ExportError(f"torch.export cannot export a {type(model).__name__}: {_cause(e)}") from e


def _cause(error: BaseException) -> str:
    """What the first error of a chain says, in one line: the exporter's own is a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def scopes(node: onnx.NodeProto) -> list[str]:
    """Names of the modules that a node of `to_onnx` comes from, outermost first; the last is the operation's."""
    return next((ast.literal_eval(p.value) for p in node.metadata_props if p.key == _SCOPES), [])


def open_session(
    model: bytes | str | os.PathLike,
    *,
    num_threads: int = 1,
    provider: str = CPU_PROVIDER,
    profile: str | os.PathLike | None = None,
) -> onnxruntime.InferenceSession:
    """A session of ONNX Runtime with all its optimisations.

    Args:
        model: The file, or what it holds.
        num_threads: Threads of one operation.
        provider: Execution provider.
        profile: Prefix of the file that ``session.end_profiling()`` writes; None does not profile.

    Raises:
        ImportError: onnxruntime is not installed.
        ExportError: It lacks the provider, or cannot read the model.
    """
    ort = package("onnxruntime")
    if provider not in (known := ort.get_available_providers()):
        raise ExportError(f"this onnxruntime has no {provider}; it has {', '.join(known)}")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = 3  # errors
    # threads that wait for the next call would slow whatever runs in between
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return ort.InferenceSession(source, options, providers=[provider])
    except Exception as e:  # of many kinds, all derived from Exception itself
        if not type(e).__module__.startswith("onnxruntime"):
            raise
        where = "the graph" if isinstance(model, bytes) else str(model)
        raise ExportError(f"ONNX Runtime cannot read {where}: {str(e).splitlines()[0]:.300}") from e
