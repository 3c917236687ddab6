"""Batch normalisation over the clips of all processes of a run.

torch's own runs on GPUs alone; here the same is done with what every device has, so that what a cluster does can be
seen on a laptop (Ioffe & Szegedy 2015; the gradients are those of the whole batch, for the sums are differentiable).
"""

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Sum(torch.autograd.Function):
    """The sum of all ranks' tensors; what each adds to the losses of all is summed on the way back."""

    @staticmethod
    def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(ctx, gradient)


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation whose mean and variance, in training, are those of all ranks' values together."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any number of dimensions but the first two will do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x (N, C, ...) channel by channel; N may differ from rank to rank."""
        if not self.training or distributed.get_world_size() == 1:
            return super().forward(x)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        values = x.float()
        count = torch.full((1,), values.numel() / values.shape[1], device=x.device)
        sums = _Sum.apply(torch.cat([values.sum(axes), count]))
        total, mean_C = sums[-1], sums[:-1] / sums[-1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        centred = values - mean_C.view(shape)
        variance_C = _Sum.apply(centred.square().sum(axes)) / total
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean_C, rate)
                self.running_var.lerp_(variance_C * total / (total - 1), rate)
        normal = centred * (variance_C + self.eps).rsqrt().view(shape)
        return (normal * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


def synchronised(model: nn.Module) -> nn.Module:
    """The model with its batch normalisation synchronised; weights, buffers and their names stay."""
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SyncBatchNorm
    return model
