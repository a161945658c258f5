"""Blocks written for one test: names, order and spelling that no model has."""

import torch
from torch import nn


class Norm(nn.Module):
    """RMS norm with the weight stored less 2.5."""

    def __init__(self, k):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(k) * 0.3 - 1)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (2.5 + self.gain)


class OddBlock(nn.Module):
    """Attention whose values come first ("zeta"), grouped queries by expand, and up * gate instead
    of gate * up."""

    def __init__(self, d=24, heads=6, shared=3):
        super().__init__()
        self.alpha, self.beta = Norm(d), Norm(d)
        self.heads, self.values, self.width = heads, heads // shared, d // heads
        self.zeta = nn.Linear(d, self.values * self.width)
        self.kiwi = nn.Linear(d, self.values * self.width, bias=False)
        self.whisper = nn.Linear(d, d)
        self.omega = nn.Linear(d, d, bias=False)
        self.right, self.left, self.close = (
            nn.Linear(d, 2 * d, bias=False),
            nn.Linear(d, 2 * d),
            nn.Linear(2 * d, d),
        )

    def spread(self, x, b, n):
        """Each of the few heads for several query heads: [b, n, (h w)] -> [b, heads, n, w]."""
        x = x.reshape(b, n, self.values, 1, self.width)
        x = x.expand(b, n, self.values, self.heads // self.values, self.width)
        return x.reshape(b, n, self.heads, self.width).permute(0, 2, 1, 3)

    def forward(self, x):
        b, n, d = x.shape
        y = self.alpha(x)
        v, k = self.spread(self.zeta(y), b, n), self.spread(self.kiwi(y), b, n)
        q = self.whisper(y).view(b, n, self.heads, self.width).transpose(1, 2)
        mixed = torch.softmax(q @ k.mT / self.width**0.5, -1) @ v
        x = self.omega(mixed.transpose(1, 2).reshape(b, n, d)) + x
        y = self.beta(x)
        return self.close(self.left(y) * torch.sigmoid(self.right(y))) + x


class Straight(nn.Module):
    """norm -> one -> relu -> two, with one leak of choice."""

    def __init__(self, leak, k=12):
        super().__init__()
        self.leak = leak
        self.norm, self.one, self.two = nn.LayerNorm(k), nn.Linear(k, k), nn.Linear(k, k)
        self.three = nn.Linear(k, k) if leak == "both" else None
        nn.init.normal_(self.norm.weight, 1, 0.2)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        gain = self.norm.weight + 1 if self.leak == "offset" else self.norm.weight
        y = nn.functional.layer_norm(x, (x.shape[-1],), gain, self.norm.bias)
        h = self.one(y)
        h = nn.functional.gelu(h) if self.leak == "gelu" else torch.relu(h)
        out = self.two(h)
        if self.three is not None:
            # The same channels in another order.
            out = out + self.three(h.unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2))
        if self.leak == "return":
            return out, y
        if self.leak == "dtype":
            return out + x.type_as(y)
        if self.leak == "tanh":
            return out + torch.tanh(y)
        return out + (y if self.leak == "residual" else x)


class SharedNorm(nn.Module):
    """One norm module in two places."""

    def __init__(self, k=12):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(k), nn.Linear(k, k), nn.Linear(k, k)

    def forward(self, x):
        x = x + torch.tanh(self.one(self.norm(x)))
        return x + self.two(self.norm(x))


class SharedBias(nn.Module):
    """Two linears that add one bias."""

    def __init__(self, k=12):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(k, k), nn.Linear(k, k), nn.Linear(k, k)
        self.three.bias = self.one.bias

    def forward(self, x):
        return self.two(torch.relu(self.one(x))) + torch.tanh(self.three(torch.tanh(x)))


class BilinearGate(nn.Module):
    """Both halves of one projection multiplied: scaling it would scale the product twice."""

    def __init__(self, k=12):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(k), nn.Linear(k, 2 * k), nn.Linear(k, k)

    def forward(self, x):
        a, b = self.one(self.norm(x)).chunk(2, -1)
        return self.two(a * b)


class SharedKeysAndValues(nn.Module):
    """Attention whose keys are its values: a scale of the values would change the scores."""

    def __init__(self, k=12):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(k, k), nn.Linear(k, k), nn.Linear(k, k)

    def forward(self, x):
        q, kv = self.one(x).unsqueeze(1), self.two(x).unsqueeze(1)
        return self.three(nn.functional.scaled_dot_product_attention(q, kv, kv).squeeze(1))


class Halves(nn.Module):
    """Two linears that read a half each of what a third one makes."""

    def __init__(self, k=12):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(k, 2 * k), nn.Linear(k, k), nn.Linear(k, k)

    def forward(self, x):
        a, b = torch.relu(self.one(x)).chunk(2, -1)
        return self.two(a) + self.three(b)


WAYS = {
    "repeat": lambda v: v.repeat(1, 2, 1, 1),
    "stack": lambda v: torch.stack([v, v], 2).flatten(1, 2),
    "cat": lambda v: torch.cat([v, v], 1),
    "interleave": lambda v: v.repeat_interleave(2, 1),
}


class Spread(nn.Module):
    """Grouped queries behind a mask that the block makes itself; each value head is spread over two
    heads in one of the WAYS."""

    def __init__(self, way, einsum=False):
        super().__init__()
        self.way, self.einsum = way, einsum
        self.ask, self.key, self.tell, self.sum = (
            nn.Linear(12, 12),
            nn.Linear(12, 6),
            nn.Linear(12, 6),
            nn.Linear(12, 12),
        )

    def forward(self, x):
        q, k, v = (
            linear(x).unflatten(-1, (-1, 3)).transpose(1, 2)
            for linear in (self.ask, self.key, self.tell)
        )
        k, v = WAYS[self.way](k), WAYS[self.way](v)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = (q @ k.mT).masked_fill(later, -1e9).softmax(-1)
        mixed = (
            torch.einsum("bhqk,bhkd->bqhd", weights, v)
            if self.einsum
            else (weights @ v).transpose(1, 2)
        )
        return self.sum(
            mixed.flatten(2) if self.einsum else mixed.contiguous().view(*x.shape[:2], -1)
        )


class Factor(nn.Module):
    """one -> times a parameter -> two, which takes no scale upstream beyond the parameter."""

    def __init__(self, size, alpha=1):
        super().__init__()
        self.one, self.two, self.factor, self.alpha = (
            nn.Linear(12, 12),
            nn.Linear(12, 12),
            nn.Parameter(torch.rand(size) + 1),
            alpha,
        )

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)) * torch.add(self.factor, 0.5, alpha=self.alpha))


class Numbers(nn.Module):
    """Factors, an index and a table of plain numbers beside weights that are multiplied transposed,
    in every spelling."""

    def __init__(self):
        super().__init__()
        self.turned = nn.ModuleList([nn.Linear(12, 12) for _ in range(5)])
        self.register_buffer("table", torch.randn(7, 12), persistent=False)
        self.shift = nn.Parameter(torch.randn(1, 12))

    def forward(self, x):
        a, b, c, d, e = (linear.weight for linear in self.turned)
        x = (x @ a.T) * torch.tensor([1.0, 2.0] * 6, device=x.device) @ b.t() + x.new_tensor(0.5)
        x = x @ c.mT + (x[:, [-2, 0]] @ d.transpose(0, 1)).sum(1, keepdim=True)
        return (
            x @ e.permute(1, 0)
            + self.table[torch.arange(x.shape[1], device=x.device)]
            + self.shift.softmax(-1).squeeze(0)
        )


class Interleaved(nn.Module):
    """norm -> one -> times angles, each of the first half for two neighbours, as rotary embeddings
    are spread -> two."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x, angles):
        return self.two(
            self.one(self.norm(x)) * angles[..., : angles.shape[-1] // 2].repeat_interleave(2, -1)
        )


class Blockwise(nn.Module):
    """norm -> one -> decayed over every four tokens, a block at a time -> two."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.decay = nn.Parameter(torch.rand(4, 1))

    def forward(self, x):
        y = self.one(self.norm(x))
        return self.two(
            torch.cat(
                [y[:, start : start + 4] * self.decay for start in range(0, y.shape[1], 4)], 1
            )
        )


class Counted(nn.Module):
    """norm -> one -> doubled, in two parts whose sizes the block computes -> two."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        y = self.one(self.norm(x))
        counts = nn.functional.one_hot((y[..., 0] > 0).flatten().long(), 2).sum(0).tolist()
        parts = y.flatten(0, 1).split(counts)
        return self.two(torch.cat([part * 2 for part in parts]).view_as(x))


class StateSpace(nn.Module):
    """norm -> a filter of each channel over time -> decayed by a matrix of rates, number by number
    -> out."""

    def __init__(self):
        super().__init__()
        self.mix, self.rates, self.out = (
            nn.Conv1d(12, 12, 3, groups=12),
            nn.Parameter(torch.rand(12, 4)),
            nn.Linear(12, 12),
        )

    def forward(self, x):
        x = nn.functional.conv1d(
            nn.functional.pad(x.mT, (2, 0)),
            self.mix.weight.squeeze(1).unsqueeze(1),
            self.mix.bias,
            groups=12,
        ).mT
        return self.out((x[..., None] * -self.rates.float().exp()).sum(-1))
