"""torch.compile, export and AOTInductor of whole models: one graph, the operators counted in it,
the cache's key."""

import pytest
import torch
from lowering_cases import Seen, activations, check_product, lowered, random_leaf

import qlab
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.algebra.transform import chain
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering import QLinear, inductor_options, lower
from qlab.lowering.compiler.rewrite import Rewrite
from qlab.methods.inputs import quantize_inputs
from qlab.methods.rtn import rtn

INT4, aten = Int(4, Tile(1, 64)), torch.ops.aten
pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(scope="module")
def directory(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "llama"
    return qlab.quantize(open_checkpoint(saved()), rtn(parse_spec("int4-g32")), None, out).path


def test_the_whole_model_is_one_graph_with_one_operator_per_site(directory):
    model, graphs = lower(directory), []

    def backend(graph, _):
        graphs.append(
            [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        )
        return graph.forward

    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (ids, ids[:, :5], ids[:1]):
        torch.testing.assert_close(
            compiled(input_ids=tokens, use_cache=False).logits,
            model(input_ids=tokens, use_cache=False).logits,
        )
    sites = sum(isinstance(module, QLinear) for module in model.modules())
    assert (
        [sum("qlab.int4_mm" in target for target in graph) for graph in graphs[:1]]
        == [sites]
        == [14]
    )


@pytest.mark.parametrize("spec, op", [("fp8-channel", "qlab.fp8_mm"), ("mxfp4", "qlab.dense")])
def test_a_model_without_kernels_and_with_rounded_inputs_is_one_graph_too(
    spec, op, saved, tmp_path
):
    recipe = chain(rtn(parse_spec(spec)), quantize_inputs(parse_spec("fp8-channel")))
    path = qlab.quantize(open_checkpoint(saved()), recipe, None, tmp_path / "out").path
    with pytest.warns(UserWarning, match="no kernel takes"):
        model = lower(path)
    graphs = []

    def backend(graph, _):
        graphs.append(
            [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        )
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    for tokens in (ids, ids[:, :5]):
        torch.testing.assert_close(
            compiled(input_ids=tokens, use_cache=False).logits,
            model(input_ids=tokens, use_cache=False).logits,
        )
    counts = [
        sum(op in target for target in graphs[0]) for op in (op, "qlab.round_input", "qlab.int4_mm")
    ]
    assert counts == [14, 14, 0]


def test_the_compiled_model_decodes_like_the_eager_one(saved, tmp_path):
    from transformers import StaticCache

    source = open_checkpoint(saved(num_hidden_layers=1))
    model = lower(qlab.quantize(source, rtn(parse_spec("int4-g32")), None, tmp_path / "out").path)
    ids = torch.randint(3, 128, (1, 6), generator=torch.Generator().manual_seed(1))
    seen, logits = Seen(), []
    for compile in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(input_ids=ids, past_key_values=cache)
        step = (
            torch.compile(model, fullgraph=True, dynamic=False, options=seen.options)
            if compile
            else model
        )
        logits.append(step(input_ids=ids[:, :1], past_key_values=cache).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0.05, atol=0.05)
    assert seen.count("aten._weight_int4pack_mm_for_cpu") == 7 and seen.inner.streamed == 1
    assert seen.count("aten._scaled_dot_product") == 0


def test_a_mixture_compiles_into_one_graph(saved, tmp_path):
    source = open_checkpoint(saved("mixtral", num_hidden_layers=1))
    path = qlab.quantize(source, rtn(parse_spec("int4-g32")), None, tmp_path / "out").path
    model = lower(path, dtype=torch.float32, dense_cache=True)
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    call = lambda x: model(input_ids=x, use_cache=False).logits
    compiled = torch.compile(call, fullgraph=True, options=inductor_options())
    torch.testing.assert_close(compiled(ids), call(ids), rtol=1e-4, atol=1e-4)


def test_freezing_with_max_autotune_keeps_the_weight_packed(on):
    """Inductor's int4 template competes; the dequantized weight of the many-token product is not
    folded into a constant, where it is written out (with units for bf16) and where it is left to
    the operator (without)."""
    leaf = random_leaf(64, 128, INT4)
    options = {"freezing": True, "max_autotune": True, "fx_graph_cache": False}
    for m, isa, kept in (
        (1, "avx2", "aten._weight_int4pack_mm_for_cpu"),
        (100, "amx", "qlab.dequantize"),
        (100, "avx2", "qlab.int4_mm"),
    ):
        on(isa)
        torch._dynamo.reset()
        seen, x = Seen(), activations(m, 128, torch.bfloat16)
        compiled = torch.compile(
            lowered(leaf).eval(), dynamic=False, options=seen.options | options
        )
        check_product(compiled(x), x, leaf)
        assert seen.count(kept) == 1


def test_export_with_a_dynamic_number_of_tokens():
    leaf, x = random_leaf(70, 128, INT4), activations(5, 128, torch.bfloat16)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(lowered(leaf), (x,), dynamic_shapes=({0: tokens},))
    assert sum("qlab.int4_mm" in str(node.target) for node in program.graph.nodes) == 1
    for m in (2, 70):
        x = activations(m, 128, torch.bfloat16)
        check_product(program.module()(x), x, leaf)


class OneAndAll(torch.nn.Module):
    """The products of the first token alone and of all of them, whose number is left open."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x[:1]), self.linear(x)


def test_aot_inductor_runs_the_operators(tmp_path):
    leaf, x = random_leaf(64, 128, INT4), activations(5, 128, torch.bfloat16)
    shapes = ({0: torch.export.Dim("tokens", min=2, max=4096)},)
    program = torch.export.export(OneAndAll(lowered(leaf)), (x,), dynamic_shapes=shapes)
    package = str(tmp_path / "layer.pt2")
    torch._inductor.aoti_compile_and_package(
        program, package_path=package, inductor_configs=inductor_options()
    )
    loaded = torch._inductor.aoti_load_package(package)
    for count in (5, 100):
        x = activations(count, 128, torch.bfloat16)
        one, every = loaded(x)
        check_product(one, x[:1], leaf)
        check_product(every, x, leaf)


def test_the_pass_is_named_by_the_cache_that_it_looks_into(monkeypatch):
    from qlab_kernels import cache

    rewrite = inductor_options()["post_grad_custom_pre_pass"]
    before = rewrite.uuid()
    assert before == Rewrite().uuid()
    monkeypatch.setattr(cache, "snapshot_hash", lambda: "tuned since")
    assert rewrite.uuid() == Rewrite().uuid() != before


def test_importing_installs_no_pass():
    from torch._inductor import config

    assert config.post_grad_custom_pre_pass is None
