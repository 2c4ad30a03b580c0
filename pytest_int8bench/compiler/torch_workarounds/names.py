"""Private names of torch that the compiler and the measurement use."""

from __future__ import annotations

import torch
import torch.amp.autocast_mode
import torch.nn.attention
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor

#: The backend class of ``torch.compile(backend="inductor")``. Torch 2.11 to 2.13 has no public
#: class to extend (torch/__init__.py).
InductorBackend = torch._TorchCompileInductorWrapper
#: Dynamo inserts a call of this function into a graph where ``torch.no_grad`` begins or ends, in
#: torch 2.11 to 2.13 (``GradModeVariable`` in torch/_dynamo/variables/ctx_manager.py).
SET_GRAD_ENABLED = torch._C._set_grad_enabled
#: Dynamo inserts calls of these functions into a graph where a choice of attention backends or
#: autocast begins or ends, in torch 2.11 to 2.15 (torch/_dynamo/variables/ctx_manager.py).
CHOOSE_ATTENTION = torch.nn.attention._sdpa_kernel
SETTING_CALLS = (
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch.nn.attention._backend_from_string,
    CHOOSE_ATTENTION,
)
