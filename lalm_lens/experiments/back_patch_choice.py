"""A pair of layers that was chosen, on disk and in other runs of the same weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lalm_lens.engine.branches import check
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.layer_pairs import Later, Pair, Regions, hooks_of, states_of, where
from lalm_lens.fingerprints import weights_fingerprint
from lalm_lens.generation import Generated
from lalm_lens.interventions import NamedHook
from lalm_lens.model import HookedLALM
from lalm_lens.runs import Run

On = Literal["held_out", "same"]
By = Literal["accuracy", "label_probability", "tdr"]

SAVE_ONE = "save one with `BackPatch.chosen().save(path)`."
LEAST = {"n_layers": 1, "source": 0, "target": 0, "window": 1, "seed": 0, "n_clips": 1}  # of a choice


@dataclass(frozen=True)
class BackPatchChoice:
    """A pair of layers that was chosen, to be applied to other runs of the same weights; `save` writes it as JSON."""

    model: str
    n_layers: int
    fingerprint: str  # of the model's weights: `weights_fingerprint`
    attribute: str
    place: Regions
    source: int
    target: int
    window: int
    later: Later
    picked_on: On
    picked_by: By
    seed: int  # of the positions of `audio_matched`
    n_clips: int = field(compare=False)

    @property
    def pair(self) -> Pair:
        return Pair(self.source, self.target, self.window)

    def hooks(self, model: HookedLALM, run: Run) -> list[NamedHook]:
        """For `model.run_with_hooks` and `model.generate`; run 1 runs here. Positions of the prompt alone are patched,
        in the step that computes them; what is generated looks at them. Raises `InputError` for another model than the
        one that the pair was chosen on."""
        self.check(model)
        at, put = where(run, self.place, self.seed), self.pair.put(self.n_layers, self.later)
        return hooks_of(put, states_of(model, run, sorted(set(put.values())), at), at)

    def check(self, model: HookedLALM) -> None:
        """Raise `InputError` for a model of another number of layers, or with other weights."""
        n_layers, advice = model.decoder_cfg.n_layers, "Choose a pair on this model: back_patch(...).chosen()."
        if n_layers != self.n_layers:
            raise InputError(
                f"This pair was chosen of the {self.n_layers} layers of {self.model}, and {model.cfg.model_name} has "
                f"{n_layers}. {advice}"
            )
        if weights_fingerprint(model) != self.fingerprint:
            raise InputError(
                f"This pair was chosen on {self.model}, and {model.cfg.model_name} has other weights, or the same "
                f"rounded otherwise than to bfloat16. {advice}"
            )

    def generate(self, model: HookedLALM, run: Run, max_new_tokens: int = 50, **how: Any) -> Generated:
        """`model.generate` with these hooks, which takes all other arguments."""
        return model.generate(run.inputs, max_new_tokens, fwd_hooks=self.hooks(model, run), **how)

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"method": "back_patch", **asdict(self)}, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "BackPatchChoice":
        """Raises `DataError` for a file that `save` did not write, or that is not there."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): {SAVE_ONE}") from None
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}).") from None
        if not isinstance(saved, dict) or saved.pop("method", None) != "back_patch":
            raise DataError(f"{path} is not a choice of back-patching: {SAVE_ONE}")
        if set(saved) != set(cls.__dataclass_fields__):
            raise DataError(
                f"{path} has the keys {sorted(saved)}, and a choice has {sorted(cls.__dataclass_fields__)}."
            )
        try:
            check_choice(saved)
        except InputError as error:
            raise DataError(f"{path} holds no choice of back-patching ({str(error).rstrip('.')}): {SAVE_ONE}") from None
        place = saved["place"]
        return cls(**{**saved, "place": tuple(place) if isinstance(place, list) else place})


def check_choice(saved: Mapping[str, Any]) -> None:
    """Raise `InputError` for values that no choice has."""
    for name, least in LEAST.items():
        if type(saved[name]) is not int or saved[name] < least:
            raise InputError(f"{name} is a whole number, {least} or more; got {saved[name]!r}")
    for name, known in {"later": Later, "picked_on": On, "picked_by": By}.items():
        if saved[name] not in get_args(known):
            raise InputError(f"{name} is one of {', '.join(get_args(known))}; got {saved[name]!r}")
    place = saved["place"]
    texts = [saved["model"], saved["fingerprint"], saved["attribute"], *(place if isinstance(place, list) else [place])]
    if not place or not all(isinstance(text, str) for text in texts):
        raise InputError("model, fingerprint, attribute and place are texts, a place one or several")
    pair = Pair(saved["source"], saved["target"], saved["window"])
    check((pair.source, pair.target), saved["n_layers"], "layers in the decoder")
    if pair.target >= pair.source:
        raise InputError(f"the target is a layer before the source, {pair.source}; got {pair.target}")
