"""The searches of AutoAWQ, llm-compressor and imatrix choose what their formulas say, written here
once more."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segments import correlated, moment, normal, segment

from qlab.algebra.grid import encode, fit, minmax
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.algebra.transform import chain
from qlab.methods import METHODS
from qlab.methods.autoawq import autoawq, awq_clip, clip, llmcompressor_awq
from qlab.methods.imatrix import cubic, imatrix
from qlab.methods.rtn import rtn

INT4 = parse_spec("int4-g16")
FP32 = Int(4, Tile(1, 16), True, torch.float32)


def rounded(W_ok):
    """To nearest on symmetric int4 groups of 16."""
    groups = W_ok.unflatten(-1, (-1, 16))
    s = groups.abs().amax(-1, keepdim=True) / 7.5
    return ((groups / s).round().clamp(-8, 7) * s).flatten(-2)


def losses(weights, H, absmean_k, first_plain):
    """Ratio -> the summed output errors of the weights, by the code of either library."""
    W = torch.cat(weights).abs().unflatten(-1, (-1, 16))
    w_k = (W / (W.amax(-1, keepdim=True) + 1e-6)).flatten(-2).mean(0)
    found = {}
    for i in range(20):
        r = i / 20
        duo = absmean_k.pow(r) / (w_k.pow(1 - r) + 1e-4)
        s = (absmean_k.pow(r) if first_plain and i == 0 else duo).clamp_min(1e-4)
        s = s / (s.max() * s.min()).sqrt()
        errors = [rounded(W * s) / s - W for W in weights]
        found[r] = float(sum(((D @ H) * D).sum() for D in errors))
    return found


@pytest.mark.parametrize("method", [autoawq, llmcompressor_awq])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_ratio_is_the_best_of_their_grid(method, family):
    seg = segment(family)
    searching = method(INT4)[:1]
    stats = seg.observe(
        seg.graph, {(s.source, n) for s in seg.graph.sites for n in searching[0].needs}
    )
    graph, _ = seg.solve(searching)
    scaled = 0
    for source in {site.source for site in seg.graph.sites}:
        sites = [site for site in seg.graph.sites if site.source == source]
        ratio = graph.notes.get(sites[0].path, {}).get("awq_ratio")
        if ratio is None or any("o_proj" in s.path or "out_proj" in s.path for s in sites):
            continue  # nothing takes a scale, or heads share some of it
        scaled += 1
        total_k, tokens = stats[source, "absmean"]
        found = losses(
            [seg.graph.weight_ok(site) for site in sites],
            stats[source, "second_moment"].mean_kk,
            total_k / tokens,
            method is llmcompressor_awq,
        )
        assert found[ratio] == pytest.approx(min(found.values()), rel=0.01)
    assert scaled >= 1


def test_with_s_1_among_the_ratios_no_input_is_worse_than_without_scales():
    seg = segment("llama")
    plain, scaled = (seg.solve(method(INT4))[0] for method in (rtn, llmcompressor_awq))
    stats = seg.observe(seg.graph, {(s.source, "second_moment") for s in seg.graph.sites})
    for source in {site.source for site in seg.graph.sites if "o_proj" not in site.path}:
        sites = [site for site in seg.graph.sites if site.source == source]
        H = stats[source, "second_moment"].mean_kk
        ratio = scaled.notes[sites[0].path].get("awq_ratio")
        if ratio is not None:
            found = losses([seg.graph.weight_ok(s) for s in sites], H, torch.ones(len(H)), True)
            without = sum(
                float(((D @ H) * D).sum())
                for site in sites
                for D in [dense(plain.params[site.weight]) - seg.graph.weight_ok(site)]
            )
            assert found[0.0] == pytest.approx(without, rel=0.01)


@given(st.integers(0, 999), st.sampled_from([16, 32]))
@settings(max_examples=15)
def test_clipping_leaves_no_group_with_more_error(seed, k):
    W_ok, H = normal(6, k, seed=seed), moment(correlated(50, k, seed))
    clipped, share = clip(W_ok, H, FP32)
    limit = W_ok.unflatten(1, (-1, 16)).abs().amax(-1, keepdim=True)
    assert (clipped.unflatten(1, (-1, 16)).abs() >= 0.549 * limit).any(-1).all()
    assert 0 <= share <= 1

    def errors(V_ok):
        D = (dense(encode(minmax, V_ok, FP32)) - W_ok).unflatten(1, (-1, 16))
        blocks = torch.stack([H.mean_kk[i : i + 16, i : i + 16] for i in range(0, k, 16)])
        return torch.einsum("ogn,gnm,ogm->og", D, blocks, D)

    assert (errors(clipped) <= errors(W_ok) * (1 + 1e-4)).all()
    assert (clipped.abs() <= W_ok.abs()).all()


def test_queries_and_keys_are_not_clipped():
    seg = segment("llama")
    graph, _ = seg.solve(chain(*[autoawq(INT4)]))
    noted = {site.path for site in seg.graph.sites if "clipped" in graph.notes[site.path]}
    assert noted == {s.path for s in seg.graph.sites if not s.path.endswith(("q_proj", "k_proj"))}
    graph, _ = seg.solve(awq_clip(INT4))
    assert all("clipped" in graph.notes[site.path] for site in seg.graph.sites)


@given(st.integers(0, 999), st.sampled_from(["int4-g16", "int3-g16-asym", "int2-g32-asym"]))
@settings(max_examples=15)
def test_imatrix_takes_the_share_of_the_least_weighted_cubes(seed, text):
    spec = parse_spec(text)
    W_ok, h_k = normal(4, 32, seed=seed), correlated(30, 32, seed).square().mean(0)
    x_agn, h_agn = spec.tile.split(W_ok), spec.tile.split(h_k.expand(4, -1))
    settled = Int(spec.bits, spec.tile, spec.symmetric, torch.float32)
    search = imatrix.search
    assert search is not None
    scales, zeros = search(x_agn, h_agn, settled, None)
    least = cubic(x_agn, scales, zeros, settled, h_agn)
    lo, hi = x_agn.amin(-1).clamp_max(0), x_agn.amax(-1).clamp_min(0)
    for share in (1.0, 0.9, 0.75, 0.5, 0.2):
        [(s, z)] = minmax.candidates(lo * share, hi * share, settled)
        assert (least <= cubic(x_agn, s, z, settled, h_agn) * (1 + 1e-5)).all()
    s, z = fit(imatrix, W_ok, settled, h_k)
    assert s.shape == scales.shape and (z is None) == spec.symmetric


def test_the_names_are_methods():
    assert {"imatrix", "autoawq", "llmcompressor-awq"} <= METHODS.keys()
    assert METHODS["imatrix"](INT4)[0].detail == "grid imatrix"
