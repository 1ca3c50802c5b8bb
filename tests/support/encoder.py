"""Encoder layers and feed-forward blocks for the tests: inputs, the definitions by torch's own modules, comparisons.

Inputs are numbers of float32 in either dtype, so that both compute from the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from qfast.ops import encoder_layer, feed_forward
from support.recurrent import apart, laid_out
from support.temporal_conv import mask, relative

__all__ = [
    "F32",
    "F64",
    "KERNELS",
    "NAMES",
    "Block",
    "Case",
    "apart",
    "block_inputs",
    "block_of_masks",
    "definition",
    "exact_block",
    "exact_layer",
    "inputs_of",
    "layer_of_masks",
    "operator",
    "plain_block",
    "raw_gradients",
    "relative",
    "results",
]

F32, F64 = torch.float32, torch.float64
# Whether kernels serve CPU tensors here. Without them the twin does, whose bits are those of torch's matrix products.
KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("qfast::encoder_layer", "CPU")
PARAMETERS = [name for name, _ in nn.TransformerEncoderLayer(2, 1, 3).named_parameters()]
NAMES = [name.removeprefix("self_attn.") for name in PARAMETERS]


# ---------------------------------------------------------------- the layer
@dataclass(frozen=True)
class Case:
    """Sizes of one layer. layout: how x lies in memory, see `recurrent.laid_out`."""

    batch: int
    steps: int
    width: int
    heads: int = 1
    hidden: int = 32
    last: bool = False
    layout: str = "plain"
    eps: float = 1e-5

    @property
    def name(self) -> str:
        sizes = zip("BTDhM", (self.batch, self.steps, self.width, self.heads, self.hidden), strict=True)
        ends = ["last"] * self.last + [self.layout] * (self.layout != "plain") + [f"{self.eps}"] * (self.eps != 1e-5)
        return "-".join([*(f"{letter}{size}" for letter, size in sizes), *ends])

    @property
    def settings(self) -> dict[str, object]:
        return {"heads": self.heads, "eps": self.eps, "last_step": self.last}


def inputs_of(case: Case, dtype: torch.dtype = F64, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """x and the twelve parameters in torch's order; `scale` multiplies those of the attention's products."""
    rng, width, hidden = torch.Generator().manual_seed(seed), case.width, case.hidden

    def randn(rows: int, columns: int, by: float = 1.0) -> list[Tensor]:
        """A weight and its bias."""
        return [
            (torch.randn(rows, columns, generator=rng) * by * columns**-0.5).to(dtype),
            (0.5 * torch.randn(rows, generator=rng)).to(dtype),
        ]

    x = laid_out(rng, case.layout, case.batch, case.steps, width, dtype)
    norms = [(torch.randn(width, generator=rng) * 0.3 + centre).to(dtype) for centre in (1, 0, 1, 0)]
    return [
        x,
        *randn(3 * width, width, scale),
        *randn(width, width),
        *randn(hidden, width),
        *randn(width, hidden),
        *norms,
    ]


def operator(case: Case, tensors: Sequence[Tensor], **settings: object) -> Tensor:
    return encoder_layer(tensors[0], list(tensors[1:]), **{**case.settings, **settings})


def definition(case: Case, tensors: Sequence[Tensor]) -> Tensor:
    """By torch.nn.TransformerEncoderLayer, in training mode: without its own shortcuts."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(
            case.width, case.heads, case.hidden, 0.0, layer_norm_eps=case.eps, batch_first=True, dtype=tensors[0].dtype
        )
    if case.batch == 0:  # torch's attention refuses
        out = tensors[0] * sum(part.sum() for part in tensors[1:])
    else:
        out = torch.func.functional_call(layer, dict(zip(PARAMETERS, tensors[1:], strict=True)), tensors[0])
    return out[:, -1] if case.last else out


def layer_of_masks(case: Case, tensors: Sequence[Tensor], dropout: float, seed: int) -> Tensor:
    """One operation of torch's after the other, with the masks of the rule where torch's layer has its dropout."""
    x, in_weight, in_bias, out, out_bias, w1, b1, w2, b2, *norms = tensors
    (batch, steps, width), heads = x.shape, case.heads

    def drop(values: Tensor, place: int) -> Tensor:
        drawn = mask(seed, batch, values.shape[2], steps, place, dropout)
        return values * drawn.transpose(1, 2).to(values.dtype)

    query, key, value = (
        part.view(batch, steps, heads, width // heads).transpose(1, 2)
        for part in functional.linear(x, in_weight, in_bias).chunk(3, 2)
    )
    attention = (query @ key.mT / (width // heads) ** 0.5).softmax(3)
    # the query is the batch of that mask, the window its step and the key its channel
    drawn = [mask(seed, steps, steps, batch, 3 + head, dropout).permute(2, 0, 1) for head in range(heads)]
    mixed = ((attention * torch.stack(drawn, 1).to(x.dtype)) @ value).transpose(1, 2).reshape(x.shape)
    y = x + drop(functional.linear(mixed, out, out_bias), 0)
    y = functional.layer_norm(y, (width,), norms[0], norms[1], case.eps)
    inner = drop(functional.linear(y, w1, b1).relu(), 1)
    z = functional.layer_norm(y + drop(functional.linear(inner, w2, b2), 2), (width,), norms[2], norms[3], case.eps)
    return z[:, -1] if case.last else z


def results(call: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """What `call(tensors)` returns, and the gradients of all of them from a random one of it; strides are kept."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        out = call(leaves)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
        found = torch.autograd.grad(out, leaves, grad)
    return [out.detach(), *found]


@cache
def exact_layer(case: Case, scale: float = 1.0) -> tuple[list[Tensor], list[float]]:
    """float64 result and gradients, and the relative errors of torch's layer in float32."""
    exact, narrow = (results(partial(definition, case), inputs_of(case, dtype, scale)) for dtype in (F64, F32))
    return exact, [relative(a, b) for a, b in zip(narrow, exact, strict=True)]


def raw_gradients(
    case: Case, tensors: Sequence[Tensor], dropout: float, seed: int, input_grad: bool = True
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Of the raw operators: what they return and keep, and the gradients from the one that `results` hands in."""
    x, weights, number = tensors[0], list(tensors[1:]), torch.tensor([seed])
    out, *kept = torch.ops.qfast.encoder_layer(x, weights, case.heads, case.eps, dropout, number, case.last, True)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    rest = (case.heads, dropout, number, case.last, *kept, input_grad)
    of_x, of_weights = torch.ops.qfast.encoder_layer_backward(grad, x, weights, *rest)
    return out, *kept, [of_x, *of_weights]


# ---------------------------------------------------------------- the feed-forward block
@dataclass(frozen=True)
class Block:
    """Sizes of one block; `lead` are the axes before the features."""

    lead: tuple[int, ...]
    width: int
    hidden: int
    out: int
    layout: str = "plain"

    @property
    def name(self) -> str:
        lead = "x".join(map(str, self.lead)) or "vector"
        return f"N{lead}-D{self.width}-M{self.hidden}-O{self.out}" + f"-{self.layout}" * (self.layout != "plain")


def block_inputs(block: Block, dtype: torch.dtype = F64, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """x and weight and bias of both layers."""
    rng = torch.Generator().manual_seed(seed)
    if block.layout == "plain":
        x = torch.randn(*block.lead, block.width, generator=rng).to(dtype)
    else:
        x = laid_out(rng, block.layout, *block.lead, block.width, dtype)
    tensors = [x]
    for rows, columns in ((block.hidden, block.width), (block.out, block.hidden)):
        weight, bias = torch.randn(rows, columns, generator=rng), torch.randn(rows, generator=rng)
        tensors += [(weight * scale * columns**-0.5).to(dtype), (bias * 0.5).to(dtype)]
    return tensors


def plain_block(tensors: Sequence[Tensor]) -> Tensor:
    x, weight_in, bias_in, weight_out, bias_out = tensors
    return functional.linear(functional.linear(x, weight_in, bias_in).relu(), weight_out, bias_out)


def block_of_masks(tensors: Sequence[Tensor], dropout: float, seed: int) -> Tensor:
    """With the mask of the rule on the hidden values."""
    x, weight_in, bias_in, weight_out, bias_out = tensors
    hidden = functional.linear(x, weight_in, bias_in).relu()
    rows = hidden.flatten(0, -2)
    drawn = mask(seed, len(rows), rows.shape[1], 1, 1, dropout).squeeze(2).to(x.dtype)
    return functional.linear((rows * drawn).view(hidden.shape), weight_out, bias_out)


@cache
def exact_block(block: Block) -> tuple[list[Tensor], list[float]]:
    exact, narrow = (results(plain_block, block_inputs(block, dtype)) for dtype in (F64, F32))
    return exact, [relative(a, b) for a, b in zip(narrow, exact, strict=True)]


def block_operator(tensors: Sequence[Tensor], **settings: object) -> Tensor:
    return feed_forward(*tensors, **settings)
