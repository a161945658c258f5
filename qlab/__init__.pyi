"""The public names, as editors and type checkers see them."""

from qlab.algebra.absorb import absorb as absorb
from qlab.algebra.block import Block as Block
from qlab.algebra.block import each_block as each_block
from qlab.algebra.cell import Cell as Cell
from qlab.algebra.cell import Feasible as Feasible
from qlab.algebra.cell import Weight as Weight
from qlab.algebra.gauge import gauge as gauge
from qlab.algebra.insert import insert as insert
from qlab.algebra.leaf import LowRank as LowRank
from qlab.algebra.leaf import Sum as Sum
from qlab.algebra.leaf import dense as dense
from qlab.algebra.reparametrize import reparametrize as reparametrize
from qlab.algebra.spec import Int as Int
from qlab.algebra.spec import parse_spec as parse_spec
from qlab.algebra.stats import Stat as Stat
from qlab.algebra.tile import Tile as Tile
from qlab.algebra.transform import at as at
from qlab.algebra.transform import chain as chain
from qlab.algebra.transform import each_cell as each_cell
from qlab.algebra.transform import each_weight as each_weight
from qlab.algebra.transform import keep as keep
from qlab.algebra.transform import outside as outside
from qlab.algebra.transform import rules as rules
from qlab.data.calibration import Tokens as Tokens
from qlab.data.calibration import first_windows as first_windows
from qlab.data.calibration import from_ids as from_ids
from qlab.data.calibration import tokens as tokens
from qlab.data.images import Samples as Samples
from qlab.data.images import image_samples as image_samples
from qlab.demo.hub import open as open
from qlab.directories.convert import convert as convert
from qlab.directories.inspect import inspect as inspect
from qlab.directories.model_free import quantize_files as quantize_files
from qlab.directories.results import results as results
from qlab.directories.verify import verify as verify
from qlab.driver.apply import apply as apply
from qlab.driver.plan import plan as plan
from qlab.driver.quantize import compare as compare
from qlab.driver.quantize import quantize as quantize
from qlab.driver.write import write as write
from qlab.errors import QlabError as QlabError
from qlab.evaluation.comparison import difference as difference
from qlab.evaluation.comparison import over_seeds as over_seeds
from qlab.evaluation.logits import logits as logits
from qlab.evaluation.perplexity import evaluate as evaluate
from qlab.evaluation.perplexity import perplexity as perplexity
from qlab.lowering import inductor_options as inductor_options
from qlab.lowering import lower as lower
from qlab.lowering import to_torchao as to_torchao
from qlab.methods import METHODS as METHODS
from qlab.methods.auto_round import auto_round as auto_round
from qlab.methods.auto_round import auto_round_refine as auto_round_refine
from qlab.methods.awq import awq as awq
from qlab.methods.awq import awq_scale as awq_scale
from qlab.methods.gptaq import aim_at_reference as aim_at_reference
from qlab.methods.gptaq import gptaq as gptaq
from qlab.methods.gptq import gptq as gptq
from qlab.methods.grid import GRIDS as GRIDS
from qlab.methods.inputs import RANGES as RANGES
from qlab.methods.inputs import quantize_inputs as quantize_inputs
from qlab.methods.kv import attention_inputs as attention_inputs
from qlab.methods.kv import kv_cache as kv_cache
from qlab.methods.qat import qat as qat
from qlab.methods.rotate import incoherence as incoherence
from qlab.methods.rotate import quarot as quarot
from qlab.methods.rotate import rotate_heads as rotate_heads
from qlab.methods.rotate import rotate_online as rotate_online
from qlab.methods.rtn import rtn as rtn
from qlab.methods.smoothquant import smoothquant as smoothquant

__version__: str
HOMES: dict[str, str]

def installed_version() -> str: ...
