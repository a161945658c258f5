"""Eleven methods as a reader writes them from docs/writing_methods.md: one for each part of the
page."""

import torch

import qlab
from qlab.algebra.random import generator
from qlab.methods.grid import Grid, encode, minmax


# ------------------------------------------------------------------ grids and codes
def _powers(lo, hi, spec):
    yield from minmax.candidates(lo, hi, spec)
    for up in (1.0, 0.5):
        end = up * 2.0 ** torch.maximum(hi.abs(), lo.abs()).clamp_min(1e-12).log2().ceil()
        yield from minmax.candidates(torch.maximum(lo, -end), torch.minimum(hi, end), spec)


def powers(spec):
    """Ranges may end at powers of two."""
    return qlab.rtn(spec, Grid("powers", _powers))


def drawn(spec):
    """Up or down by chance, each weight by numbers of its own."""

    def draw(weight):
        name = weight.name if weight.expert is None else f"{weight.name} {weight.expert}"
        leaf, chance = weight.cell.leaf, generator(7, name)
        x = leaf.at(weight.cell.target)
        return weight.cell.put(leaf.with_codes((x + torch.rand(x.shape, generator=chance)).floor()))

    return qlab.chain(qlab.rtn(spec), qlab.each_cell("drawn", draw))


def fed_back(spec):
    """The mean error of each row goes into what is aimed at."""

    def aim(weight):
        W_ok = weight.cell.target
        x_k = weight.stats["mean_input"]
        lost_o = (W_ok - qlab.dense(encode(minmax, W_ok, spec), torch.float32)) @ x_k
        step_k = x_k / (x_k.square().sum() + 1e-6 * len(x_k))
        return weight.cell.aim(W_ok + 0.5 * torch.outer(lost_o, step_k))

    return qlab.chain(qlab.each_cell("fed_back", aim, needs={mean_input}), qlab.rtn(spec))


mean_input = qlab.Stat(
    lambda seen: seen.x_nk.float().sum(0) / 64,
    torch.add,
    nothing=torch.zeros,
    name="mean_input",
)


# ------------------------------------------------------------------ masks and leaves
def channels(spec):
    """The input channels with the least energy are left out, and GPTQ makes up for them."""

    def choose(weight):
        W_ok = weight.cell.target
        energy_k = W_ok.square().sum(0) * weight.stats["second_moment"].mean_square_k
        kept_k = energy_k >= energy_k.quantile(0.1)
        return weight.cell.narrow(support=kept_k.expand_as(W_ok))

    return qlab.chain(qlab.each_cell("channels", choose, needs={"second_moment"}), qlab.gptq(spec))


def around_low_rank(spec):
    """A low rank first, and codes of what it leaves over."""

    def split(weight):
        W_ok = weight.cell.target
        U, s, V = torch.linalg.svd(W_ok, full_matrices=False)
        low = qlab.LowRank(U[:, :4] * s[:4], V[:4])
        rest = encode(minmax, W_ok - qlab.dense(low, torch.float32), spec)
        return weight.cell.put(qlab.Sum((rest, low)))

    return qlab.each_cell("around_low_rank", split, spec=spec, leaves="codes around a low rank")


def counted(spec):
    """How many tokens an expert saw is said of it, and one that saw few keeps the nearest codes."""

    def better(weight):
        cell, seen = weight.cell, weight.stats["seen"]
        if weight.expert is not None and seen < 8:
            return cell.put(cell.leaf, kept_nearest=weight.expert)
        x = cell.leaf.at(cell.target)
        lost_o = (x - x.round()).sum(1)  # of a row, handed to the weight that is nearest to a half
        most = (x - x.round()).abs().argmax(1, keepdim=True)
        codes = x.round().scatter_add(1, most, lost_o.clamp(-1, 1).round()[:, None])
        return cell.put(cell.leaf.with_codes(codes))

    return qlab.chain(qlab.rtn(spec), qlab.each_cell("counted", better, needs={seen}))


seen = qlab.Stat(lambda seen: len(seen.x_nk), lambda a, b: a + b, nothing=lambda k: 0, name="seen")


# ------------------------------------------------------------------ bases, values, blocks
fourth = qlab.Stat(lambda seen: seen.x_nk.float().pow(4).sum(0), torch.add, name="fourth")


def heavy_tails(spec):
    """Channels whose inputs have heavy tails are made smaller."""

    def smooth(turn):
        if turn.fold is None or turn.apart:
            return None
        x_k = torch.stack([source.stats["fourth"] for source in turn.sources()]).sum(0)
        return turn.stored(x_k.clamp_min(1e-6).pow(0.125))

    return qlab.chain(qlab.gauge("heavy_tails", "*:in", smooth, needs={fourth}), qlab.rtn(spec))


def sparse_activations(spec):
    """Of what an activation returns, numbers below a share of the largest ones are 0."""

    def make(wire, stats):
        least_k = 0.05 * stats["absmax"]
        return lambda x: torch.where(x.abs() < least_k, 0, x)

    pattern = "re:.*(act_fn|activation_fn|mlp[.]act|experts):out"
    return qlab.chain(qlab.rtn(spec), qlab.insert("sparse_activations", pattern, make, {"absmax"}))


def shifted_keys(spec):
    """Keys in 8 bits around the mean of each channel."""
    mean = qlab.Stat(
        lambda seen: torch.stack([seen.x_nk.float().mean(0), torch.ones(seen.x_nk.shape[1])]),
        torch.add,
        name="mean_and_batches",
    )

    def make(wire, stats):
        total_k, batches_k = stats["mean_and_batches"]
        c_k = total_k / batches_k

        def run(x):
            step = (x - c_k).abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
            return ((x - c_k) / step).round() * step + c_k

        return run

    return qlab.chain(qlab.rtn(spec), qlab.insert("shifted_keys", "*:key", make, {mean}))


def norm_gains(spec):
    """Gains of norms, learned in two steps behind the rounding."""

    def learn(block):
        params = block.segment.params
        norms = [n for n, leaf in params.items() if torch.is_tensor(leaf) and leaf.ndim == 1]
        gains = {n: params[n].float().clone().requires_grad_() for n in norms}
        adam, every = torch.optim.Adam(gains.values(), lr=1e-3), range(block.count)
        best, least = {}, float(block.loss(block.segment, every))
        for _ in range(2):
            adam.zero_grad()
            block.loss(block.put(gains), every).backward()
            adam.step()
            now = {n: gain.detach().clone() for n, gain in gains.items()}
            loss = float(block.loss(block.put(now), every))
            best, least = (now, loss) if loss < least else (best, least)
        return best, {"loss_after": least}

    return qlab.chain(qlab.rtn(spec), qlab.each_block("norm_gains", learn))


# ------------------------------------------------------------------ the whole model
def least_harm(spec):
    """The block that three bits harm least gets them."""

    def measure(model):
        loss = model.kl_to(model.reference)

        def harm(path):
            def changed(at, segment):
                if at != path:
                    return segment
                rounded = {
                    site.weight: qlab.dense(
                        encode(minmax, segment.params[site.weight], qlab.parse_spec("int3-g16")),
                        torch.float32,
                    )
                    for site in segment.sites
                    if segment.params[site.weight].ndim == 2 and not site.router
                }
                return segment.update(rounded)

            return sum(model.losses(loss, changed=changed))

        return {path: harm(path) for path in model.segments}

    def then(harm):
        least = min(harm, key=harm.get)
        return qlab.rules({f"{least}.*": qlab.rtn("int3-g16"), "*": qlab.rtn(spec)})

    return qlab.bind("least_harm", measure, then)


WHOLE_READER_STEPS = {"least_harm": least_harm}
READER_STEPS = {
    step.__name__: step
    for step in (
        powers,
        drawn,
        fed_back,
        channels,
        around_low_rank,
        counted,
        heavy_tails,
        sparse_activations,
        shifted_keys,
        norm_gains,
    )
}
# what formats hold no place for -> how the refusal names it
UNHELD_READER = {
    "around_low_rank": "codes around a low rank",
    "sparse_activations": "has no place",
    "shifted_keys": "has no place",
}
