"""Labelled clips: single files, folders, and datasets of Hugging Face's layout, SAKURA among them."""

from lalm_lens.datasets.clip import Clip, Refused, balance, cleaned, read_clips
from lalm_lens.datasets.folder import list_folder, read_attributes, read_folder
from lalm_lens.datasets.hub import list_dataset, list_hub, sakura
from lalm_lens.datasets.sample import Sample, cut_to, heard, read_sample, refuse_repeated, seen, unheard
from lalm_lens.datasets.splits import split

__all__ = [
    "Clip",
    "Refused",
    "Sample",
    "balance",
    "cleaned",
    "cut_to",
    "heard",
    "list_dataset",
    "list_folder",
    "list_hub",
    "read_attributes",
    "read_clips",
    "read_folder",
    "read_sample",
    "refuse_repeated",
    "sakura",
    "seen",
    "split",
    "unheard",
]
