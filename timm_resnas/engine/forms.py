"""Forms in which a model runs: other precision or memory format, compiled, scripted, exported, in ONNX Runtime.

A form is written as parts joined by "+": any of `CHANGES`, and at most one of `RUNNERS`, such as "channels_last" or
"bfloat16+compile".
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import torch
from timm import set_scriptable
from torch import nn

from ..nas.onnx import INPUT, OUTPUT, open_session, to_onnx, to_program

__all__ = ["CHANGES", "RUNNERS", "Run", "check_form", "form_of"]

Run = Callable[[torch.Tensor], torch.Tensor]  # images -> logits
CHANGES = ("bfloat16", "channels_last")
RUNNERS = ("eager", "compile", "export", "torchscript", "onnx", "onnx_legacy")


def check_form(form: str) -> str:
    """The form, if it is one.

    Raises:
        ValueError: It has an unknown part or two runners, or ONNX Runtime cannot compute it.
    """
    parts = form.split("+")
    runners = [p for p in parts if p in RUNNERS]
    if len(runners) > 1 or set(parts) - {*CHANGES, *RUNNERS} or len(set(parts)) < len(parts):
        raise ValueError(
            f"{form!r} is no form; expected parts of {', '.join(CHANGES)} and one of {', '.join(RUNNERS)}, joined by +"
        )
    if runners and runners[0].startswith("onnx") and len(parts) > 1:
        raise ValueError(f"{form!r}: ONNX Runtime computes in float32 and its own memory format; leave {parts} alone")
    return form


def form_of(create: Callable[[], nn.Module], form: str, images: torch.Tensor) -> Run:
    """The model in a form, as a function of images of any batch size.

    'compile' is one graph (``fullgraph=True``); 'export' is torch.export's program; 'onnx' and 'onnx_legacy' are the
    graphs of torch's two exporters, run by ONNX Runtime on a CPU with torch's number of threads.

    Args:
        create: Makes the model; the same weights in each call.
        form: See the module.
        images: An example of its input, in float32, with a batch of at least 2.

    Raises:
        ValueError: There is no such form.
        Exception: What torch, its exporters or ONNX Runtime raise where the model has no such form.
    """
    parts = check_form(form).split("+")
    runner = next((p for p in parts if p in RUNNERS), "eager")
    with set_scriptable(runner == "torchscript"):
        model = create().eval().requires_grad_(False)
    kwargs: dict = {}
    if "bfloat16" in parts:
        model, kwargs["dtype"] = model.to(torch.bfloat16), torch.bfloat16
    if "channels_last" in parts:
        model, kwargs["memory_format"] = model.to(memory_format=torch.channels_last), torch.channels_last
    if runner.startswith("onnx"):
        return _in_onnx_runtime(model, images, legacy=runner == "onnx_legacy")
    run: Run = model
    example = images.to(**kwargs)
    if runner == "compile":
        run = torch.compile(model, fullgraph=True)
    elif runner == "export":
        run = to_program(model, example).module()
    elif runner == "torchscript":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is deprecated", DeprecationWarning)
            warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning)  # from torch 2.14 on
            run = torch.jit.script(model)
    return lambda x: run(x.to(**kwargs)) if kwargs else run(x)


def _in_onnx_runtime(model: nn.Module, images: torch.Tensor, legacy: bool) -> Run:
    if legacy:
        graph = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # what becomes a constant or is not folded: outputs at two batch sizes show whether it matters
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            warnings.filterwarnings("ignore", "Constant folding|ONNX export mode", UserWarning)
            torch.onnx.export(
                model,
                (images,),
                graph,
                dynamo=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
            )
        content = graph.getvalue()
    else:
        content = to_onnx(model, images).SerializeToString()
    session = open_session(content, num_threads=torch.get_num_threads())
    return lambda x: torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])
