"""A small network of our own, for CPUs and small sets: it has half a million parameters and learns at once.

Padding is skipped, not masked afterwards: the image part sees valid frames only, and every temporal
convolution finds zeros beyond a clip's end. A clip's logits are therefore the same whatever it is batched
with, in training up to the batch statistics, which are taken over valid frames alone.
"""

from torch import Tensor, nn
from torch.nn import functional

from lipprep.train.models.layers import Packing, activation
from lipprep.train.models.stem import unfold_frames
from lipprep.train.models.tcn import same_conv

STEM_CHANNELS = 32
TRUNK_WIDTHS = (32, 64, 128)


class CompactStem(nn.Module):
    """The image halved, 5 frames as 5 channels, a 5x5 convolution, norm, 2x2 max pooling, activation."""

    skips_padding = True

    def __init__(self, activation_name: str):
        super().__init__()
        self.conv = nn.Conv2d(5, STEM_CHANNELS, 5, 2, 2, bias=False)
        self.norm = nn.BatchNorm2d(STEM_CHANNELS)
        self.activation = activation(activation_name, STEM_CHANNELS)

    def forward(self, x_B1THW: Tensor, lengths_B: Tensor) -> Tensor:
        """-> (N, C, H / 8, W / 8) for the N valid frames."""
        packing = Packing(lengths_B, x_B1THW.shape[2])
        x_BTHW = functional.avg_pool2d(x_B1THW[:, 0], 2) * packing.valid_BT[:, :, None, None]
        frames_NCHW = packing.pack(unfold_frames(x_BTHW, 5))
        # Pooling without overlap costs a CPU half as much, and the activation after it a quarter.
        return self.activation(functional.max_pool2d(self.norm(self.conv(frames_NCHW)), 2))


class CompactHead(nn.Module):
    """Residual dilated convolutions over the valid frames, their mean, a classifier."""

    ignores_padding = True

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        activation_name: str,
        kernel_size: int,
        num_layers: int,
        channels: int,
        dropout: float,
    ):
        super().__init__()
        self.project = nn.Linear(in_channels, channels) if in_channels != channels else nn.Identity()
        self.convs = nn.ModuleList(same_conv(channels, channels, kernel_size, 2**layer) for layer in range(num_layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels) for _ in range(num_layers))
        self.activations = nn.ModuleList(activation(activation_name, channels) for _ in range(num_layers))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(channels, num_classes)

    def forward(self, feat_BTC: Tensor, lengths_B: Tensor) -> Tensor:
        packing = Packing(lengths_B, feat_BTC.shape[1])
        feat_NC = self.project(packing.pack(feat_BTC))
        for conv, norm, act in zip(self.convs, self.norms, self.activations, strict=True):
            out_NC = packing.pack(conv(packing.unpack(feat_NC).mT).mT)
            feat_NC = feat_NC + self.dropout(act(norm(out_NC)))
        total_BC = packing.unpack(feat_NC).sum(1)
        return self.output(total_BC / lengths_B[:, None].to(total_BC.dtype))
