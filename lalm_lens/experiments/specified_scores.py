"""Claims about information scores, and the numbers themselves, under every choice."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import pandas as pd

from lalm_lens.attributes import Attribute
from lalm_lens.datasets import Sample
from lalm_lens.experiments.audiolens import deafness
from lalm_lens.experiments.choices import Choices, Reasons, claims_of, rows_of
from lalm_lens.experiments.claim import Claim, Quantity, Reads
from lalm_lens.experiments.claims import QUANTITIES
from lalm_lens.experiments.evidence import Measured, NotMeasured, evidence_for
from lalm_lens.experiments.information_score import InformationScore, information_score
from lalm_lens.model import HookedLALM


def scored(
    model: HookedLALM,
    samples: Sequence[Sample],
    attribute: Attribute,
    spaces: Sequence[bool],
    norms: Sequence[bool],
    token_budget: int | None,
    progress: bool,
) -> dict[bool, Measured]:
    """Information scores with and without the final norm, and with the audio out of sight."""
    found = {}
    for norm in norms:
        how = {"attribute": attribute, "label_spaces": tuple(spaces), "norm": norm, "token_budget": token_budget}
        whole = information_score(model, samples, **how, progress=progress)
        without = information_score(model, samples, **how, forms=("P3",), knockouts=deafness(model), progress=progress)
        frame = pd.concat([whole.frame, without.frame], ignore_index=True)
        found[norm] = Measured(model.cfg.model_name, {InformationScore: frame}, norm)
    return found


def score_rows(
    tables: Mapping[bool, Measured], attribute: Attribute, choices: Choices, reasons: Reasons, resampled: Mapping
) -> Iterator[dict]:
    """The claims about scores, and the numbers themselves, in every specification."""
    numbers = [its for its in QUANTITIES.values() if its.reads == "scores"]
    for norm, space in product(choices.norms, choices.label_spaces):
        row = {"norm": norm, "label_space": space}
        for base in choices.layer_bases:
            counted = [its for its in numbers if its.name == "critical_layer"]
            yield from score_row(
                "scores", counted, tables[norm], attribute, {**row, "layer_base": base}, reasons, resampled
            )
        others = [its for its in numbers if its.name != "critical_layer"]
        yield from score_row("scores", others, tables[norm], attribute, row, reasons, resampled)
        for reads in ("scores", "positions", "masked", "right", "wrong"):
            yield from score_row(reads, claims_of(reads), tables[norm], attribute, row, reasons, resampled)


def score_row(
    reads: Reads,
    subjects: Sequence[Claim | Quantity],
    table: Measured,
    attribute: Attribute,
    row: Mapping,
    reasons: Reasons,
    resampled: Mapping,
) -> Iterator[dict]:
    evidence, reason = None, reasons.get(row["label_space"], "")
    if not reason:
        try:
            evidence = evidence_for(reads, table, attribute.name, row["label_space"], row.get("layer_base"), {})
        except NotMeasured as error:
            reason = str(error)
    yield from rows_of(subjects, evidence, row, reason, resampled)
