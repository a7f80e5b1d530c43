"""Reversible residual blocks: training recomputes their inputs from their outputs instead of keeping them.

Paper: `The Reversible Residual Network` - https://arxiv.org/abs/1707.04585
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from timm.models import checkpoint, register_notrace_module
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

__all__ = ["ReversibleBlocks"]


class _State:
    """State of the random number generators, where the module is in training mode, to run it twice alike."""

    def __init__(self, module: nn.Module, x: torch.Tensor):
        self.enabled = module.training
        if self.enabled:
            self.device_type = x.device.type if x.device.type not in ("cpu", "meta") else "cuda"
            self.cpu = torch.get_rng_state()
            self.devices, self.states = get_device_states(x)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        with torch.random.fork_rng(self.devices, device_type=self.device_type):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, device_type=self.device_type)
            yield


class _Reversible(torch.autograd.Function):
    """A run of blocks that keeps its outputs, and recomputes all else in the backward pass."""

    @staticmethod
    def forward(ctx, blocks: list[nn.Module], x1: torch.Tensor, x2: torch.Tensor, *params: nn.Parameter):
        kind = x1.device.type
        ctx.autocast = contextlib.nullcontext
        if torch.amp.is_autocast_available(kind):
            state = dict(dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
            ctx.autocast = partial(torch.autocast, kind, **state)
        ctx.blocks, ctx.params, ctx.versions = blocks, params, [p._version for p in params]
        ctx.states, all_kept = [], []
        for block in blocks:
            states = [_State(block, x1)]
            y, kept = block.attend(x2, None)
            x1 = x1 + y
            states.append(_State(block, x1))
            x2 = x2 + block.feed_forward(x1)
            ctx.states.append(states)
            all_kept.append(kept)
        ctx.save_for_backward(x1, x2, *all_kept)
        return x1, x2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d1: torch.Tensor, d2: torch.Tensor):
        if [p._version for p in ctx.params] != ctx.versions:
            raise RuntimeError("Parameters of reversible blocks must not change between forward and backward pass.")
        x1, x2, *all_kept = ctx.saved_tensors
        grads: dict[nn.Parameter, torch.Tensor] = {}

        def differentiate(y: torch.Tensor, x: torch.Tensor, block: nn.Module, dy: torch.Tensor) -> torch.Tensor:
            params = [p for p in block.parameters() if p.requires_grad]
            dx, *rest = torch.autograd.grad(y, [x, *params], dy, allow_unused=True)
            for p, dp in zip(params, rest, strict=True):
                if dp is not None:
                    grads[p] = grads[p] + dp if p in grads else dp
            return dx

        for block, states, kept in zip(reversed(ctx.blocks), reversed(ctx.states), reversed(all_kept), strict=True):
            x1 = x1.detach().requires_grad_()
            with torch.enable_grad(), ctx.autocast(), states[1].restored():
                y = block.feed_forward(x1)
            d1 = d1 + differentiate(y, x1, block, d2)
            x2 = (x2 - y).detach().requires_grad_()
            with torch.enable_grad(), ctx.autocast(), states[0].restored():
                y, _ = block.attend(x2, kept)
            d2 = d2 + differentiate(y, x2, block, d1)
            x1 = (x1 - y).detach()
            del y  # with its graph, before the next block's
        return None, d1, d2, *(grads.get(p) for p in ctx.params)


@register_notrace_module
class ReversibleBlocks(nn.Sequential):
    """Blocks y1 = x1 + attend(x2), y2 = x2 + feed_forward(y1), over two copies of the tokens `[B, N, C]`.

    Returns the mean of both streams. A block has `forward(x1, x2) -> (y1, y2)`, and for training
    `attend(x, kept) -> (y, kept)` and `feed_forward(x) -> y`. What `attend` returns as `kept` (a tensor or None) is
    given to it again when the block is recomputed: choices that must not change by the rounding of its input.

    Random numbers (dropout, drop path) are the same in the recomputation. Memory for activations does not grow with
    the number of blocks, but for `kept`; each block runs twice.

    Args:
        reversible: recompute in the backward pass; otherwise, and under `torch.compile`, plain autograd with the same
            result.
    """

    def __init__(self, *blocks, reversible: bool = True):
        super().__init__(*blocks)
        self.reversible = reversible
        self.grad_checkpointing = False

    @torch.jit.unused
    def run(
        self, x1: torch.Tensor, x2: torch.Tensor, start: int = 0, end: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both streams after the blocks from `start` up to `end`."""
        blocks = list(self)[start:end]
        graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # of the blocks themselves
        if self.reversible and torch.is_grad_enabled() and blocks and not graph:
            params = dict.fromkeys(p for block in blocks for p in block.parameters())  # each once, were they shared
            return _Reversible.apply(blocks, x1, x2, *params)
        for block in blocks:
            if self.grad_checkpointing:
                x1, x2 = checkpoint(block, x1, x2)
            else:
                x1, x2 = block(x1, x2)
        return x1, x2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1 = x2 = widen(x)
        if torch.jit.is_scripting():
            for block in self:
                x1, x2 = block(x1, x2)
        else:
            x1, x2 = self.run(x1, x2)
        return ((x1 + x2) / 2).to(x.dtype)


def widen(x: torch.Tensor) -> torch.Tensor:
    """Return at least float32: narrower streams would drift when they are recomputed."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
