"""Recurrent heads: bidirectional GRUs (VIPL's, Feng et al. 2020) and LSTMs (Stafylakis & Tzimiropoulos 2017).

Each frame is classified by itself, and a clip's answer is the mean over its own frames. As published, the recurrence
also reads what stands in the padding.
"""

import contextlib

import torch
from torch import Tensor, nn

from lipprep.io.errors import UserError
from lipprep.train.models.layers import mean_over_valid

CELLS = {"bigru": nn.GRU, "bilstm": nn.LSTM}
CONSENSUS = ("scores", "posteriors")


class Recurrent(nn.Module):
    """Bidirectional layers, a classifier a frame, the mean over a clip's frames.

    With `consensus` "posteriors" the frames' log posteriors are averaged, not their scores. `independent` keeps the
    two directions apart to the end: two stacks of layers, one of which reads the clip backwards, where otherwise each
    layer reads what both directions of the one below say. `dropout` is between layers, `output_dropout` before the
    classifier.
    """

    drawn_by_torch = True

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        activation_name: str,
        cell: str,
        hidden: int,
        num_layers: int,
        dropout: float,
        output_dropout: float,
        independent: bool,
        consensus: str,
    ):
        super().__init__()
        if consensus not in CONSENSUS:
            raise UserError(f"unknown consensus {consensus!r} of the {cell} head: known are {', '.join(CONSENSUS)}")
        # torch warns of dropout between the layers where there is one.
        how = {"batch_first": True, "dropout": dropout if num_layers > 1 else 0.0}
        make = CELLS[cell]
        if independent:
            self.rnn = nn.ModuleList(make(in_channels, hidden, num_layers, **how) for _ in range(2))
        else:
            self.rnn = make(in_channels, hidden, num_layers, bidirectional=True, **how)
        self.dropout = nn.Dropout(output_dropout)
        self.output = nn.Linear(2 * hidden, num_classes)
        self.normalised = consensus == "posteriors"

    def read_frames(self, feat_BTC: Tensor) -> Tensor:
        """What each frame says by itself: (B, T, classes), log posteriors where those are averaged, else scores."""
        # Autocast does not know recurrent layers on every device; the published code leaves it before them, too.
        device = feat_BTC.device.type
        known = torch.amp.is_autocast_available(device)  # not where shapes alone are computed
        with torch.autocast(device, enabled=False) if known else contextlib.nullcontext():
            feat_BTC = feat_BTC.to(self.output.weight.dtype)
            if isinstance(self.rnn, nn.ModuleList):
                ahead, back = self.rnn
                out_BTC = torch.cat([ahead(feat_BTC)[0], back(feat_BTC.flip(1))[0].flip(1)], dim=2)
            else:
                out_BTC = self.rnn(feat_BTC)[0]
            scores = self.output(self.dropout(out_BTC))
        return scores.log_softmax(2) if self.normalised else scores

    def forward(self, feat_BTC: Tensor, lengths_B: Tensor) -> Tensor:
        return mean_over_valid(self.read_frames(feat_BTC), lengths_B)
