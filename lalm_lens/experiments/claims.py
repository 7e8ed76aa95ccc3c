"""What two papers say about layers and positions, each as one number against one bound.

What a paper leaves to words ("near zero", "sharp") has a bound of ours; it stands beside the words.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from lalm_lens.experiments.claim import PLACES, Claim, Curve, Evidence, Measure, Numbers, Quantity, Reads, Relation
from lalm_lens.experiments.correlation import correlation, p_of, rank_correlation
from lalm_lens.experiments.resolution import critical_layer as critical_layers
from lalm_lens.experiments.resolution import mean_defined

CT, AL = "arXiv 2603.13768", "arXiv 2506.05140"
FEW = 6  # layers: fewer have no middle and no ends
DEPTH_15 = 15 / 32  # of the models whose curves are stable "after layer 15"

CLAIMS: dict[str, Claim] = {}
QUANTITIES: dict[str, Quantity] = {}


def claim(
    words: str, source: str, reads: Reads, relation: Relation, bound: float, counts_layers: bool = False
) -> Callable[[Measure], Measure]:
    def enter(measure: Measure) -> Measure:
        CLAIMS[measure.__name__] = Claim(words, source, reads, measure, relation, bound, counts_layers)
        return measure

    return enter


def quantity(reads: Reads) -> Callable[[Measure], Measure]:
    def enter(measure: Measure) -> Measure:
        QUANTITIES[measure.__name__] = Quantity(reads, measure)
        return measure

    return enter


# --- causal tracing -----------------------------------------------------------------------------------------------


@claim("recovery is near zero in the early layers", f"{CT}, Fig. 2, sec. 5.1", "text", "<", 0.2)
def early_recovery(about: Evidence, text: Curve) -> Numbers:
    """Mean recovery of the layers in the first half."""
    return text[:, : text.shape[1] // 2].mean(1)


@claim("a sharp transition in the final third", f"{CT}, Fig. 2, sec. 5.1", "text", ">=", 0.55, counts_layers=True)
def transition_depth(about: Evidence, text: Curve) -> Numbers:
    """The first layer that recovers half, as a share of all layers."""
    return depth_of(text >= 0.5, about)


@claim("recovery rises gradually with depth", f"{CT}, Fig. 2, sec. 5.1", "text", ">", 0.9)
def gradual_rise(about: Evidence, text: Curve) -> Numbers:
    """Spearman's correlation of layer and recovery."""
    return rank_correlation(text)


@claim("recovery is stable from layer 15 of 32 on", f"{CT}, Fig. 2, sec. 5.1", "text", ">", 0.8, counts_layers=True)
def stable_after_15(about: Evidence, text: Curve) -> Numbers:
    """Recovery at layer 15 of 32, or at that depth, over recovery at the last layer."""
    return text[:, round(DEPTH_15 * text.shape[1]) - about.layer_base] / text[:, -1]


@claim("full recovery is reached earlier than in DeSTA and Qwen", f"{CT}, Fig. 2, sec. 5.1", "models", ">", 0.0)
def earlier_than_others(about: Evidence, own: Curve, *others: Float[np.ndarray, "resample _"]) -> Numbers:
    """Depth at which a model reaches 95 % of its largest recovery: how far that of every other lies behind it."""
    own_depth, *depths = (depth_of(its >= 0.95 * its.max(1, keepdims=True), about) for its in (own, *others))
    return np.min(depths, axis=0) - own_depth


@claim("recovery is highest at the last token", f"{CT}, Fig. 3, sec. 5.2", "places", ">=", 0.8)
def last_is_highest(about: Evidence, places: Float[np.ndarray, "resample place layer"]) -> Numbers:
    """Share of the layers in the second half in which no other segment recovers as much as the last token."""
    if places.shape[-1] < FEW:
        return np.full(len(places), np.nan)
    later = places[..., places.shape[-1] // 2 + 1 :]
    return (later[:, -1] > later[:, :-1].max(1)).mean(1)


@claim("a spike at the object token in the middle layers", f"{CT}, Fig. 3, sec. 5.2", "places", ">=", 0.05)
def object_spike(about: Evidence, places: Float[np.ndarray, "resample place layer"]) -> Numbers:
    """What the object recovers beyond the rest of the prompt, at most, in the middle third of the layers."""
    if places.shape[-1] < FEW:
        return np.full(len(places), np.nan)
    early, objects, late, _ = places[..., middle_third(places.shape[-1])].swapaxes(0, 1)
    return (objects - np.maximum(early, late)).max(1)


@claim("significant causal activity at the object token", f"{CT}, Fig. 3, sec. 5.2", "places", ">=", 0.05)
def object_activity(about: Evidence, places: Float[np.ndarray, "resample place layer"]) -> Numbers:
    """What the object recovers at most in any layer."""
    return places[:, PLACES.index("object")].max(1)


# --- AudioLens ----------------------------------------------------------------------------------------------------


@quantity("scores")
def critical_layer(about: Evidence, scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """Eq. 4, the mean over prompts."""
    return mean_defined(resolved(about, scores, 0))


@quantity("scores")
def accuracy_percent(about: Evidence, scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """The last layer's score, the mean over prompts."""
    return 100 * scores[..., -1].mean(1)


@quantity("attributes")
def pearson_r(about: Evidence, *scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """Correlation of accuracy and critical layer over attributes and prompts; undefined critical layers left out."""
    layers = points_of(about, scores)
    return correlation(np.concatenate([its[..., -1] for its in scores], axis=1), layers)


@quantity("attributes")
def pearson_p(about: Evidence, *scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """Its two-sided p."""
    return p_of(pearson_r(about, *scores), np.isfinite(points_of(about, scores)).sum(1))


@quantity("attributes")
def n_points(about: Evidence, *scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """How many points are correlated."""
    return np.isfinite(points_of(about, scores)).sum(1).astype(float)


@quantity("factors")
def best_gain_percent(about: Evidence, accuracy: Float[np.ndarray, "resample arm factor"]) -> Numbers:
    """Gain over no enrichment at the factor that is best for the clips themselves, relative."""
    best = int(about.groups[0].mean(0)[0].argmax())  # of the clips as they are, in all resamples
    before = accuracy[:, 0, about.factors.index(0)]
    gained = accuracy[:, 0, best] - before
    return 100 * np.divide(gained, before, out=np.full(before.shape, np.nan), where=before > 0)


@claim("layers that know little are near chance", f"{AL}, Fig. 2, sec. VI-A", "scores", "<", 0.1)
def first_layers_off_chance(about: Evidence, scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """How far the mean score of the first quarter of the layers is from chance."""
    return abs(scores[..., : max(1, scores.shape[-1] // 4)].mean((1, 2)) - about.chance())


@claim("some layers fall well below chance", f"{AL}, Fig. 2, sec. VI-A", "scores", "<", 0.5)
def lowest_over_chance(about: Evidence, scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """The lowest score of any layer and prompt, over chance."""
    return scores.min((1, 2)) / about.chance()


@claim("scores rise with depth", f"{AL}, Fig. 2, sec. VI-A", "scores", ">=", 0.5)
def rise_with_depth(about: Evidence, scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """Spearman's correlation of layer and score, the mean over prompts."""
    return rank_correlation(scores).mean(1)


@claim("sharp drops are followed by recoveries", f"{AL}, Fig. 2, sec. VI-A", "scores", ">=", 0.05)
def deepest_dip(about: Evidence, scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """How far a layer falls below one before it and below one behind it, at most."""
    before = np.maximum.accumulate(scores, axis=-1)
    behind = np.maximum.accumulate(scores[..., ::-1], axis=-1)[..., ::-1]
    return (np.minimum(before, behind) - scores).max((1, 2))


@claim("a late drop does not recover", f"{AL}, Fig. 2e, sec. VI-A", "scores", ">=", 0.05)
def late_drop(about: Evidence, scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """What the last layer has lost of the highest score, the mean over prompts."""
    return (scores.max(-1) - scores[..., -1]).mean(1)


@claim("the information is in the middle and late layers", f"{AL}, Fig. 2, sec. VI-A", "scores", ">", 0.0)
def middle_over_ends(about: Evidence, scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """Mean score from a third of the depth to five sixths, above that of the layers before and of those behind."""
    n_layers, mean = scores.shape[-1], scores.mean(1)
    if n_layers < FEW:
        return np.full(len(scores), np.nan)
    first, end = n_layers // 3, -(-5 * n_layers // 6)
    inside, before, behind = (its.mean(1) for its in (mean[:, first:end], mean[:, :first], mean[:, end:]))
    return inside - np.maximum(before, behind)


@claim("scores are consistent over prompt formats", f"{AL}, Fig. 2, sec. VI-A", "scores", ">=", 0.8)
def agreement_of_forms(about: Evidence, scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """Pearson's correlation of the curves of two prompts, the smallest."""
    n_forms = scores.shape[1]
    pairs = [(a, b) for a in range(n_forms) for b in range(a)]
    if not pairs:
        return np.full(len(scores), np.nan)
    return np.min([correlation(scores[:, a], scores[:, b]) for a, b in pairs], axis=0)


@claim("what ends right rises with depth", f"{AL}, Fig. 3, sec. VI-B", "right", ">=", 0.5)
def right_rise(about: Evidence, scores: Curve) -> Numbers:
    """Spearman's correlation of layer and score, of the clips that the last layer gets right."""
    return rank_correlation(scores)


@claim("what ends wrong peaks before and declines", f"{AL}, Fig. 3, sec. VI-B", "wrong", ">=", 0.05)
def wrong_peak(about: Evidence, scores: Curve) -> Numbers:
    """The highest score, of the clips that the last layer gets wrong, where it is 0: above chance, and above that of
    the one answer that is most often right of them."""
    return scores.max(1) - max(about.chance(), about.constant)


@claim("gender is resolved first", f"{AL}, Table II, sec. VI-C", "attributes", ">", 0.0)
def gender_first(about: Evidence, *scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """Layers from the critical layer of gender to the first of those of language and animal."""
    gender, language, _, animal = (mean_defined(resolved(about, its, group)) for group, its in enumerate(scores))
    return np.minimum(language, animal) - gender


@claim("emotion is resolved last", f"{AL}, Table II, sec. VI-C", "attributes", ">", 0.0)
def emotion_last(about: Evidence, *scores: Float[np.ndarray, "resample form layer"]) -> Numbers:
    """Layers from the last of the critical layers of language and animal to that of emotion."""
    _, language, emotion, animal = (mean_defined(resolved(about, its, group)) for group, its in enumerate(scores))
    return emotion - np.maximum(language, animal)


@claim("the last token is above the penultimate in the final layers", f"{AL}, Fig. 4, sec. VI-D", "positions", ">", 0.0)
def last_over_penultimate(about: Evidence, scores: Float[np.ndarray, "resample place layer"]) -> Numbers:
    """Score at the last position minus that at the penultimate one, the smallest of the last four layers."""
    return (scores[:, 0] - scores[:, 1])[:, -4:].min(1)


@claim("without the audio in sight the last token drops", f"{AL}, Fig. 4, sec. VI-D", "masked", ">=", 0.05)
def drop_without_audio(about: Evidence, scores: Float[np.ndarray, "resample sight layer"]) -> Numbers:
    """Score at the last position minus that with the audio knocked out, the mean of the last four layers."""
    return (scores[:, 0] - scores[:, 1])[:, -4:].mean(1)


@claim("without the audio in sight accuracy drops", f"{AL}, sec. VI-D", "knockout", ">=", 0.05)
def accuracy_without_audio(about: Evidence, accuracy: Float[np.ndarray, "resample sight"]) -> Numbers:
    """Accuracy minus that with the audio knocked out for the last position."""
    return accuracy[:, 0] - accuracy[:, 1]


@claim("the chosen layer beats random ones over many factors", f"{AL}, Fig. 5, sec. VI-E", "factors", ">=", 0.5)
def share_above_random(about: Evidence, accuracy: Float[np.ndarray, "resample arm factor"]) -> Numbers:
    """Share of the factors but 0 at which the chosen layer is more accurate than random ones."""
    others = [n for n, factor in enumerate(about.factors) if factor]
    return (accuracy[:, 0, others] > accuracy[:, 1, others]).mean(1)


@claim("a factor that is too small or too large is worse", f"{AL}, Fig. 5, sec. VI-E", "factors", ">", 0.0)
def interior_optimum(about: Evidence, accuracy: Float[np.ndarray, "resample arm factor"]) -> Numbers:
    """Accuracy at the best factor between the smallest and the largest, above that of these two."""
    chosen = accuracy[:, 0]
    if len(about.factors) < 3:
        return np.full(len(chosen), np.nan)
    best = 1 + int(about.groups[0].mean(0)[0, 1:-1].argmax())
    return chosen[:, best] - np.maximum(chosen[:, 0], chosen[:, -1])


# --- what they share -----------------------------------------------------------------------------------------------


def middle_third(n_layers: int) -> slice:
    return slice(round(n_layers / 3), round(2 * n_layers / 3))


def depth_of(is_there: Bool[np.ndarray, "resample layer"], about: Evidence) -> Numbers:
    """The first layer where something is, as a share of all; NaN where it is nowhere."""
    first = (is_there.argmax(1) + about.layer_base) / is_there.shape[1]
    return np.where(is_there.any(1), first, np.nan)


def resolved(
    about: Evidence, scores: Float[np.ndarray, "resample form layer"], group: int
) -> Float[np.ndarray, "resample form"]:
    return critical_layers(scores, about.n_labels[group], alpha=about.alpha, layer_base=about.layer_base)


def points_of(
    about: Evidence, scores: Sequence[Float[np.ndarray, "resample form layer"]]
) -> Float[np.ndarray, "resample point"]:
    """Critical layers of every attribute and prompt."""
    return np.concatenate([resolved(about, its, group) for group, its in enumerate(scores)], axis=1)
