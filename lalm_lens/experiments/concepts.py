"""When a token names what is heard: the rule by which words are counted."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lalm_lens.errors import PromptError
from lalm_lens.prompts import Processor

CASES: tuple[Callable[[str], str], ...] = (str, str.lower, str.capitalize, str.upper)
Named = dict[str, frozenset[int]]  # the tokens that name each label


@dataclass(frozen=True)
class ExactWord:
    """The label itself, where it is one token: as it is written, in lower case, capitalised or in capitals, with the
    space before it or without."""

    def tokens(self, processor: Processor, labels: Sequence[str]) -> Named:
        """Raises `PromptError` for a label that no token is, and for tokens that name two labels."""
        return checked({label: whole(processor, [label]) for label in labels})

    def __str__(self) -> str:
        return "exact word"


@dataclass(frozen=True)
class FirstToken:
    """The first token of the label, as `logit_lens` reads it: of a longer word it may begin other words too."""

    label_space: bool = True

    def tokens(self, processor: Processor, labels: Sequence[str]) -> Named:
        """Raises `PromptError` for labels that begin alike."""
        first = processor.label_tokens(labels, self.label_space)
        return {label: frozenset([token]) for label, token in first.items()}

    def __str__(self) -> str:
        return f"first token {'with' if self.label_space else 'without'} the space before it"


@dataclass(frozen=True)
class AnyOf:
    """Any of the words given for the label, each as an `ExactWord`: synonyms, or what belongs to it. The label itself
    counts where it is among them; words that are no single token are never found, and one of a label's must be."""

    words: Mapping[str, Sequence[str]]

    def tokens(self, processor: Processor, labels: Sequence[str]) -> Named:
        """Raises `PromptError` for a label without words, or none of whose words is a token."""
        if missing := [label for label in labels if not self.words.get(label)]:
            raise PromptError(f"No words are given for {missing[0]!r}: give some for every label.")
        return checked({label: whole(processor, self.words[label]) for label in labels})

    def __str__(self) -> str:
        return "any of " + "; ".join(f"{label}: {', '.join(words)}" for label, words in self.words.items())


Rule = ExactWord | FirstToken | AnyOf


def whole(processor: Processor, words: Sequence[str]) -> frozenset[int]:
    """The tokens that are one of the words."""
    texts = {space + case(word) for word in words for case in CASES for space in ("", " ")}
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in sorted(texts)]
    return frozenset(its[0] for its in ids if len(its) == 1)


def checked(named: Named) -> Named:
    for label, tokens in named.items():
        if not tokens:
            raise PromptError(
                f"No token is the word {label!r}, or those given for it, so it could never be found: use FirstToken, "
                "or AnyOf with words that are."
            )
    token, n = Counter(token for tokens in named.values() for token in tokens).most_common(1)[0]
    if n > 1:
        twins = [label for label, tokens in named.items() if token in tokens]
        raise PromptError(
            f"The labels {twins} are named by the same token {token}: give words of which each names one."
        )
    return named
