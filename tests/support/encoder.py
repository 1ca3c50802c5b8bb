"""Cases of the encoder layer and of the feed-forward block, defined by torch's modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from qfast.ops import encoder_layer, feed_forward
from support.operator_case import F64
from support.tensors import LAYOUTS, laid_out, philox_mask

# Whether there are kernels for CPU tensors. Plain torch's bits depend on torch's matrix products.
KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("qfast::encoder_layer", "CPU")
PARAMETERS = [name for name, _ in nn.TransformerEncoderLayer(2, 1, 3).named_parameters()]
NAMES = [name.removeprefix("self_attn.") for name in PARAMETERS]


# ---------------------------------------------------------------- the layer
@dataclass(frozen=True)
class LayerCase:
    """Sizes of one layer; `layout` is the layout of x in memory, see `laid_out`."""

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

    def inputs(self, dtype: torch.dtype = F64, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
        """x and the twelve parameters in torch's order; `scale` multiplies the weights of queries, keys and values."""
        rng, width, hidden = torch.Generator().manual_seed(seed), self.width, self.hidden

        def randn(rows: int, columns: int, by: float = 1.0) -> list[Tensor]:
            """A weight and its bias."""
            return [
                (torch.randn(rows, columns, generator=rng) * by * columns**-0.5).to(dtype),
                (0.5 * torch.randn(rows, generator=rng)).to(dtype),
            ]

        x = laid_out(rng, self.layout, self.batch, self.steps, width, dtype)
        norms = [(torch.randn(width, generator=rng) * 0.3 + centre).to(dtype) for centre in (1, 0, 1, 0)]
        return [
            x,
            *randn(3 * width, width, scale),
            *randn(width, width),
            *randn(hidden, width),
            *randn(width, hidden),
            *norms,
        ]

    def reference(self, tensors: Sequence[Tensor]) -> Tensor:
        """torch.nn.TransformerEncoderLayer in training mode, which has no fast path."""
        with torch.device("meta"):
            layer = nn.TransformerEncoderLayer(
                self.width,
                self.heads,
                self.hidden,
                0.0,
                layer_norm_eps=self.eps,
                batch_first=True,
                dtype=tensors[0].dtype,
            )
        if self.batch == 0:  # torch's attention raises an error
            out = tensors[0] * sum(part.sum() for part in tensors[1:])
        else:
            out = torch.func.functional_call(layer, dict(zip(PARAMETERS, tensors[1:], strict=True)), tensors[0])
        return out[:, -1] if self.last else out

    def operator(self, tensors: Sequence[Tensor], **settings: object) -> Tensor:
        return encoder_layer(tensors[0], list(tensors[1:]), **{**self.settings, **settings})


def layer_of_masks(case: LayerCase, tensors: Sequence[Tensor], dropout: float, seed: int) -> Tensor:
    """The layer from torch's operations, with qfast's masks in the places of torch's dropout."""
    x, in_weight, in_bias, out, out_bias, w1, b1, w2, b2, *norms = tensors
    (batch, steps, width), heads = x.shape, case.heads

    def drop(values: Tensor, place: int) -> Tensor:
        drawn = philox_mask(seed, batch, values.shape[2], steps, place, dropout)
        return values * drawn.transpose(1, 2).to(values.dtype)

    query, key, value = (
        part.view(batch, steps, heads, width // heads).transpose(1, 2)
        for part in functional.linear(x, in_weight, in_bias).chunk(3, 2)
    )
    attention = (query @ key.mT / (width // heads) ** 0.5).softmax(3)
    # in this mask the query is the batch, the window the step and the key the channel
    drawn = [philox_mask(seed, steps, steps, batch, 3 + head, dropout).permute(2, 0, 1) for head in range(heads)]
    mixed = ((attention * torch.stack(drawn, 1).to(x.dtype)) @ value).transpose(1, 2).reshape(x.shape)
    y = x + drop(functional.linear(mixed, out, out_bias), 0)
    y = functional.layer_norm(y, (width,), norms[0], norms[1], case.eps)
    inner = drop(functional.linear(y, w1, b1).relu(), 1)
    z = functional.layer_norm(y + drop(functional.linear(inner, w2, b2), 2), (width,), norms[2], norms[3], case.eps)
    return z[:, -1] if case.last else z


def raw_gradients(
    case: LayerCase, tensors: Sequence[Tensor], dropout: float, seed: int, input_grad: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Results, saved tensors and gradients of the raw operators, for the incoming gradient that `results` uses."""
    x, weights, number = tensors[0], list(tensors[1:]), torch.tensor([seed])
    out, *saved = torch.ops.qfast.encoder_layer(x, weights, case.heads, case.eps, dropout, number, case.last, True)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    rest = (case.heads, dropout, number, case.last, *saved, input_grad)
    of_x, of_weights = torch.ops.qfast.encoder_layer_backward(grad, x, weights, *rest)
    return out, *saved, [of_x, *of_weights]


# ---------------------------------------------------------------- the feed-forward block
@dataclass(frozen=True)
class BlockCase:
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

    def inputs(self, dtype: torch.dtype = F64, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
        """x, then weight and bias of both layers."""
        rng = torch.Generator().manual_seed(seed)
        if self.layout == "plain":
            x = torch.randn(*self.lead, self.width, generator=rng).to(dtype)
        else:
            x = laid_out(rng, self.layout, *self.lead, self.width, dtype)
        tensors = [x]
        for rows, columns in ((self.hidden, self.width), (self.out, self.hidden)):
            weight, bias = torch.randn(rows, columns, generator=rng), torch.randn(rows, generator=rng)
            tensors += [(weight * scale * columns**-0.5).to(dtype), (bias * 0.5).to(dtype)]
        return tensors

    def reference(self, tensors: Sequence[Tensor]) -> Tensor:
        x, weight_in, bias_in, weight_out, bias_out = tensors
        return functional.linear(functional.linear(x, weight_in, bias_in).relu(), weight_out, bias_out)

    def operator(self, tensors: Sequence[Tensor], **settings: object) -> Tensor:
        return feed_forward(*tensors, **settings)


def block_of_masks(tensors: Sequence[Tensor], dropout: float, seed: int) -> Tensor:
    """The block with qfast's dropout mask on the hidden values."""
    x, weight_in, bias_in, weight_out, bias_out = tensors
    hidden = functional.linear(x, weight_in, bias_in).relu()
    rows = hidden.flatten(0, -2)
    drawn = philox_mask(seed, len(rows), rows.shape[1], 1, 1, dropout).squeeze(2).to(x.dtype)
    return functional.linear((rows * drawn).view(hidden.shape), weight_out, bias_out)


BLOCK_CASES = [
    BlockCase((0,), 5, 7, 3),
    BlockCase((3, 0), 5, 7, 3),
    BlockCase((), 5, 7, 3),
    BlockCase((1,), 1, 1, 1),
    *(BlockCase((n,), 16, 64, 16) for n in (1, 2, 3, 5, 7, 13, 23, 24, 25, 100, 481)),
    *(
        BlockCase((9,), d, 40, o)
        for d, o in ((8, 8), (10, 3), (24, 1), (36, 36), (64, 64), (72, 5), (128, 17), (512, 512))
    ),
    *(BlockCase((11,), 20, m, 20) for m in (1, 7, 63, 64, 65, 100, 256, 2048)),
    BlockCase((5, 7), 12, 33, 6),
    BlockCase((2, 3, 4), 12, 33, 6),
    BlockCase((30, 20), 64, 2048, 64),
    *(BlockCase((14, 6), 12, 33, 9, layout) for layout in LAYOUTS if layout != "plain"),
]


# Every size of the models, and both sides of every vector, panel and tile.
LAYER_CASES = [
    LayerCase(0, 5, 8, 2),
    LayerCase(0, 5, 8, 2, last=True),
    LayerCase(1, 1, 4, 1, 1),
    LayerCase(1, 1, 8, 4, 7),
    *(LayerCase(b, 7, 16, 2, 64, last=b % 2 == 0) for b in (1, 2, 3, 5, 13, 100)),
    *(LayerCase(5, t, 24, 3, 64, last=last) for t in (1, 2, 3, 20, 60, 130) for last in (False, True)),
    *(
        LayerCase(6, 7, d, heads, 50, last=last)
        for d, heads in ((8, 4), (10, 5), (36, 6), (64, 2), (72, 8), (128, 1))
        for last in (False, True)
    ),
    LayerCase(3, 4, 64, 64, 40),
    LayerCase(2, 3, 512, 8, 100),
    LayerCase(2, 3, 512, 2, 100, last=True),
    *(LayerCase(7, 5, 20, 2, m, last=m % 2 == 0) for m in (1, 7, 64, 100, 256, 2048)),
    # the models' sizes, with few windows
    LayerCase(26, 20, 64, 2, 2048),
    LayerCase(26, 20, 64, 2, 2048, last=True),
    *(
        LayerCase(14, 6, 12, 3, last=last, layout=layout)
        for layout in LAYOUTS
        if layout != "plain"
        for last in (False, True)
    ),
    LayerCase(9, 6, 12, 3, eps=1e-2),
    LayerCase(9, 6, 12, 3, eps=1e-2, last=True),
]


LONG_LAYER_CASES = [
    *(
        LayerCase(b, t, d, h, m, last=last)
        for b, t, d, h, m in (
            (100, 20, 64, 2, 2048),
            (13, 60, 64, 4, 2048),
            (3, 512, 64, 2, 256),
            (2, 300, 128, 8, 100),
            (5, 20, 512, 8, 2048),
            (1000, 2, 8, 4, 64),
            (300, 3, 36, 6, 256),
        )
        for last in (False, True)
    ),
    *(
        LayerCase(4, 33, d, h, 70, last=last)
        for d in (8, 16, 24, 36, 64, 72, 128, 250)
        for h in range(1, d + 1)
        if d % h == 0
        for last in (False, True)
    ),
]
