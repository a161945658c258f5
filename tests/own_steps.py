"""Ten methods as somebody writes them who has read docs/writing_methods.md and no source: one for
each kind of step, from public names alone."""

import torch

import qlab
from qlab.methods.grid import Grid, minmax


# ------------------------------------------------------------------ a grid
def _two_ends(lo, hi, spec):
    yield from minmax.candidates(lo, hi, spec)
    for low in (1.0, 0.85, 0.7):
        for high in (1.0, 0.85, 0.7):
            yield from minmax.candidates(lo * low, hi * high, spec)


def clipped_ends(spec):
    """Both ends of each range shrunken apart."""
    return qlab.rtn(spec, Grid("two_ends", _two_ends, weighted=True))


# ------------------------------------------------------------------ one weight
def _centres(W_ok, entries):
    """Each weight's nearest of a few values per row, by Lloyd's steps."""
    low, high = W_ok.aminmax(dim=1, keepdim=True)
    c_oe = low + (high - low) * torch.linspace(0, 1, entries)
    for _ in range(5):
        nearest_ok = (W_ok[:, :, None] - c_oe[:, None]).abs().argmin(-1)
        sums = torch.zeros_like(c_oe).scatter_add_(1, nearest_ok, W_ok)
        counts = torch.zeros_like(c_oe).scatter_add_(1, nearest_ok, torch.ones_like(W_ok))
        c_oe = torch.where(counts > 0, sums / counts.clamp_min(1), c_oe)
    nearest_ok = (W_ok[:, :, None] - c_oe[:, None]).abs().argmin(-1)
    return c_oe.gather(1, nearest_ok)


def codebook(spec):
    """k-means: 2^bits values per row. Such numbers are written dense."""
    entries = 2 ** min(getattr(spec, "bits", 4), 4)
    return qlab.each_cell(
        "codebook", lambda weight: weight.cell.put(_centres(weight.cell.target, entries))
    )


def two_of_four(spec):
    """2:4 by the second moment, then GPTQ on what is left."""

    def choose(weight):
        W_ok = weight.cell.target
        score = W_ok.square() * weight.stats["second_moment"].mean_square_k
        largest = score.unflatten(1, (-1, 4)).topk(2).indices
        support = torch.zeros_like(W_ok, dtype=torch.bool).unflatten(1, (-1, 4))
        return weight.cell.narrow(support=support.scatter(2, largest, True).flatten(1))

    return qlab.chain(
        qlab.each_cell("two_of_four", choose, needs={"second_moment"}), qlab.gptq(spec)
    )


def stochastic(spec):
    """Rounded up or down by chance, without bias, on the scales that rtn chose."""

    def draw(weight):
        leaf, chance = weight.cell.leaf, torch.Generator().manual_seed(0)
        x = leaf.at(weight.cell.target)
        return weight.cell.put(leaf.with_codes((x + torch.rand(x.shape, generator=chance)).floor()))

    return qlab.chain(qlab.rtn(spec), qlab.each_cell("stochastic", draw))


def outliers(spec):
    """The largest errors beside the codes, as they are. No format holds it."""

    def beside(weight):
        error = weight.cell.target - qlab.dense(weight.cell.leaf, torch.float32)
        largest = error.abs().flatten().topk(max(1, error.numel() // 200)).indices
        kept = torch.zeros(error.numel()).scatter(0, largest, error.flatten()[largest])
        return weight.cell.put(qlab.Sum((weight.cell.leaf, kept.view_as(error))))

    return qlab.chain(qlab.rtn(spec), qlab.each_cell("outliers", beside))


# ------------------------------------------------------------------ a whole block
def bias_correction(spec):
    """The mean error of a block's output, taken back by the bias of its last linear."""

    def correct(block):
        ends = ("down_proj", "fc2", "mlp.c_proj")
        (last, *_) = [site.path for site in block.segment.sites if site.path.endswith(ends)]
        if f"{last}.bias" not in block.segment.params:
            return {}
        every = range(block.count)
        with torch.no_grad():
            outputs = block.outputs(block.segment, every)
        error = torch.stack(
            [(t - y).mean((0, 1)) for t, y in zip(block.targets(every), outputs, strict=True)]
        ).mean(0)
        better = {f"{last}.bias": block.segment.params[f"{last}.bias"] + error}
        with torch.no_grad():
            before, after = (
                block.loss(segment, every) for segment in (block.segment, block.put(better))
            )
        return better if after < before else {}

    return qlab.chain(qlab.rtn(spec), qlab.each_block("bias_correction", correct))


def output_scales(spec):
    """A gain for every output, learned in three steps, then rounded."""

    def learn(block):
        W = {site.path: block.weight(site.path) for site in block.segment.sites if not site.router}
        gains = {
            path: w[..., :1].new_ones(w[..., :1].shape).requires_grad_() for path, w in W.items()
        }
        adam, every = torch.optim.Adam(gains.values(), lr=1e-3), range(block.count)
        best, lowest = {}, float(block.loss(block.segment, every))
        for _ in range(3):
            adam.zero_grad()
            block.loss(
                block.put({path: gains[path] * w for path, w in W.items()}), every
            ).backward()
            adam.step()
            better = {path: (gains[path] * w).detach() for path, w in W.items()}
            loss = float(block.loss(block.put(better), every))
            best, lowest = (better, loss) if loss < lowest else (best, lowest)
        return best, {"loss_after": lowest}

    return qlab.chain(qlab.each_block("output_scales", learn), qlab.rtn(spec))


# ------------------------------------------------------------------ a change of basis
def heads(spec):
    """The values of each head turned to the principal axes of what reads them."""

    def axes(turn):
        if not hasattr(turn.group, "size"):  # no heads
            return None
        W_ok = turn.sources()[0].weights[0]
        return torch.linalg.svd(W_ok.reshape(-1, turn.group.size), full_matrices=False).Vh

    return qlab.chain(
        qlab.gauge("heads", "re:.*attn.*(o_proj|out_proj|c_proj):in", axes), qlab.rtn(spec)
    )


p99 = qlab.Stat(lambda seen: seen.x_nk.abs().float().quantile(0.99, 0), torch.maximum, name="p99")


def percentiles(spec):
    """SmoothQuant with the 99th percentile of inputs in the place of their largest."""

    def smooth(turn):
        if turn.fold is None or turn.apart:
            return None
        x_k = torch.stack([source.stats["p99"] for source in turn.sources()]).amax(0)
        columns = [W.abs().amax(0) for source in turn.sources() for W in source.weights]
        w_k = torch.stack(columns).amax(0)
        return turn.stored((x_k.clamp_min(1e-4) / w_k.clamp_min(1e-4)).sqrt())

    return qlab.chain(qlab.gauge("percentiles", "*:in", smooth, needs={p99}), qlab.rtn(spec))


# ------------------------------------------------------------------ at run time
def kv4(spec):
    """Keys and values in 4 bits, with a scale for each token of each head. No format holds it."""

    def rounded(wire, stats):
        def run(x):
            scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 7
            return (x / scale).round().clamp(-8, 7) * scale

        return run

    inserts = [qlab.insert(f"kv4_{name}", f"*:{name}", rounded) for name in ("key", "value")]
    return qlab.chain(qlab.rtn(spec), *inserts)


OWN_STEPS = {
    step.__name__: step
    for step in (
        clipped_ends,
        codebook,
        two_of_four,
        stochastic,
        outliers,
        bias_correction,
        output_scales,
        heads,
        percentiles,
        kv4,
    )
}
# What no format holds, by what a refusal says of it.
UNWRITTEN = {"outliers": "a Sum", "kv4": "has no place"}
