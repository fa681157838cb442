"""The modules of the embedded pair's recipe that the study stands on, under one roof."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train_demo_pair"))

from answers import load_sequences
from drafter import Eagle3, Switches, tap_layers
from mtp import MTP
from muon import Muon
from rows import pack
from schedule import lr_factor
from target import Llama
from tokenizer import PAD, token_id
from train_drafters import STEP_DECAY, draft_vocabulary

__all__ = [
    "MTP",
    "PAD",
    "STEP_DECAY",
    "Eagle3",
    "Llama",
    "Muon",
    "Switches",
    "draft_vocabulary",
    "load_sequences",
    "lr_factor",
    "pack",
    "tap_layers",
    "token_id",
]
