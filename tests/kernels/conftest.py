"""Without a GPU, kernels run in Triton's interpreter; it must be chosen before any of them is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
