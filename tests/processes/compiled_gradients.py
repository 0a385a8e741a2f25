"""Compare the gradients of a compiled encoder with those of the plain one."""

from collections.abc import Callable

import torch
from torch import Tensor

from keyhole.engine.compiled import Compiled
from keyhole.nn import SmallEncoder

torch.manual_seed(0)
encoder = SmallEncoder(1, 4, stages=1)
patches = torch.rand(6, 1, 16, 16)


def gradients(run: Callable[[Tensor], Tensor]) -> Tensor:
    encoder.zero_grad()
    run(patches).square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in encoder.parameters() if parameter.grad is not None])


eager, compiled = gradients(encoder), gradients(Compiled(lambda patches, _: encoder(patches), "learn"))
assert torch.isfinite(compiled).all(), compiled
assert (compiled - eager).norm() < 1e-3 * eager.norm(), (compiled - eager).norm() / eager.norm()
