"""The one table of tolerances: relative Frobenius error against the float64 reference, by dtype of the input."""

import torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TF32 = 1e-3
