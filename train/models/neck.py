"""What may stand between trunk and head, on each frame by itself."""

from torch import Tensor, nn


class Neck(nn.Sequential):
    """A linear layer to `channels` (None: there is none), batch norm, dropout, in this order, as far as wanted."""

    def __init__(self, in_channels: int, *, channels: int | None, norm: bool, dropout: float):
        super().__init__()
        if channels is not None:
            self.project = nn.Linear(in_channels, channels)
        self.channels = channels or in_channels
        if norm:
            self.norm = nn.BatchNorm1d(self.channels)
        if dropout:
            self.dropout = nn.Dropout(dropout)

    def forward(self, feat_NC: Tensor) -> Tensor:
        return super().forward(feat_NC)
