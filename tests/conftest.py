"""One thread, no network: the tests run alike everywhere."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

import torchvision_ops

torchvision_ops.define_missing()
torch.set_num_threads(1)
settings.register_profile("actmaps", max_examples=30, deadline=None)
settings.load_profile("actmaps")
