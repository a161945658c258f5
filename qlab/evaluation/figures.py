"""What is measured of a model on windows of text, with intervals."""

from dataclasses import dataclass
from typing import Any

from qlab.evaluation.statistics import holds
from qlab.process.shown import Shown, interval

INDISTINGUISHABLE = "indistinguishable from the reference: the paired interval holds 1"


@dataclass(frozen=True, repr=False, kw_only=True)
class Evaluation(Shown):
    """Means over all predicted tokens. Fields ending in `_ci` are 95 % bootstrap intervals over
    windows.

    perplexity = exp(mean NLL). kl = mean KL(reference || model) in nats. top1_agreement: the share
    of tokens for which both models find the same token most likely. ratio_ci: the paired interval
    of perplexity / reference_perplexity. layer_error: |h - h_ref| / |h_ref| of the hidden states of
    the first window, after every block.

    kl_median, kl_p90, kl_p99, kl_max: of the divergences of single tokens. flips_lost,
    flips_gained: how often the most likely token is the text's next one for the reference alone,
    and for the model alone; flips_p: McNemar's mid-p value that neither is more frequent.
    nll_by_window, nll_ref_by_window, kl_by_window: means of each window. ids_sha256: the hash of
    the windows' tokens. calibration_overlap: the share of windows that were seen to have text in
    common with the model's calibration data; None where the model does not say what that was.
    """

    perplexity: float
    perplexity_ci: tuple[float, float]
    reference_perplexity: float
    ratio_ci: tuple[float, float]
    kl: float
    kl_ci: tuple[float, float]
    top1_agreement: float
    top1_ci: tuple[float, float]
    windows: int
    length: int
    predictions: int
    layer_error: tuple[float, ...]
    kl_median: float | None = None
    kl_p90: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    flips_lost: int = 0
    flips_gained: int = 0
    flips_p: float = 1.0
    nll_by_window: tuple[float, ...] = ()
    nll_ref_by_window: tuple[float, ...] = ()
    kl_by_window: tuple[float, ...] = ()
    ids_sha256: str | None = None
    calibration_overlap: float | None = None

    @property
    def flips(self) -> float:
        """The share of predicted tokens whose answer turned from right to wrong or from wrong to
        right."""
        return (self.flips_lost + self.flips_gained) / self.predictions

    @property
    def indistinguishable(self) -> bool:
        """Whether the paired interval of perplexity / reference_perplexity holds 1."""
        return holds(self.ratio_ci, 1.0)

    def summary(self) -> dict[str, str]:
        """Every figure with its interval."""
        ratio = self.perplexity / self.reference_perplexity
        facts = {
            "perplexity": interval(self.perplexity, self.perplexity_ci),
            "reference perplexity": f"{self.reference_perplexity:.4f}",
            "perplexity / reference": interval(ratio, self.ratio_ci),
            "KL divergence (nats)": interval(self.kl, self.kl_ci),
            "top-1 agreement": interval(self.top1_agreement, self.top1_ci),
            "over": (
                f"{self.windows} windows of {self.length} tokens, {self.predictions:,} predictions"
            ),
        }
        if self.indistinguishable:
            facts["perplexity / reference"] += f", {INDISTINGUISHABLE}"
        return facts | self.details()

    def details(self) -> dict[str, str]:
        """The divergences of single tokens and the flips; empty where they were not measured."""
        if self.kl_median is None:
            return {}
        return {
            "KL of single tokens": (
                f"median {self.kl_median:.4f}, 90 % {self.kl_p90:.4f}, 99 % {self.kl_p99:.4f}, "
                f"most {self.kl_max:.4f}"
            ),
            "flips": (
                f"{self.flips:.4f} of all tokens: {self.flips_lost} right to wrong, "
                f"{self.flips_gained} wrong to right (McNemar p = {self.flips_p:.3g})"
            ),
        }

    def json(self) -> dict[str, Any]:
        """The evaluation as plain data."""
        said = {"flips": self.flips, "indistinguishable": self.indistinguishable}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()} | said


@dataclass(frozen=True, repr=False, kw_only=True)
class Perplexity(Shown):
    """perplexity = exp(mean NLL) over all predicted tokens, and its 95 % bootstrap interval over
    windows."""

    perplexity: float
    perplexity_ci: tuple[float, float]
    windows: int
    length: int
    predictions: int

    def summary(self) -> dict[str, str]:
        """The figure with its interval."""
        return {
            "perplexity": interval(self.perplexity, self.perplexity_ci),
            "over": (
                f"{self.windows} windows of {self.length} tokens, {self.predictions:,} predictions"
            ),
        }

    def json(self) -> dict[str, Any]:
        """The perplexity as plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
