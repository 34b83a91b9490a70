"""Attention, recurrence, embeddings, and tokens folded into the batch: see ``architectures``."""

from __future__ import annotations

import torch
from architectures_vision import head
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

__all__ = ["BUILDERS"]


class ViT(nn.Module):
    """A patch convolution, a class token, positions, and blocks of nn.MultiheadAttention."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.cls = nn.Parameter(0.5 * torch.randn(1, 1, 8))
        self.position = nn.Parameter(0.5 * torch.randn(1, 5, 8))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = head(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)  # [B, 4, 8]
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        if not self.batch_first:
            x = x.transpose(0, 1)
        n = self.norm1(x)
        x = x + self.attention(n, n, n, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0] if self.batch_first else x[0])


def vit() -> tuple[nn.Module, Tensor]:
    return ViT(True), torch.randn(3, 3, 8, 8)


def vit_sequence_first() -> tuple[nn.Module, Tensor]:
    return ViT(False), torch.randn(5, 3, 8, 8)  # as many tokens as samples


class CrossAttention(nn.Module):
    """Learned queries that read the tokens; keys and values of other widths, biases on keys."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, 6))
        self.attention = nn.MultiheadAttention(
            6, 2, kdim=5, vdim=4, add_bias_kv=True, batch_first=True
        )
        self.value = nn.Linear(5, 4)
        self.head = head(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(x.shape[0], -1, -1)
        out, _ = self.attention(queries, x, torch.tanh(self.value(x)))
        return self.head(3.0 * out.flatten(1))


def cross_attention() -> tuple[nn.Module, Tensor]:
    return CrossAttention(), torch.randn(3, 4, 5)


class Encoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            6, 2, 10, batch_first=not norm_first, norm_first=norm_first, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(6), enable_nested_tensor=False)
        self.axis = 0 if norm_first else 1
        self.head = head(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x.transpose(0, 1) if self.axis == 0 else x)
        return self.head(2.0 * x[:, 0] if self.axis else 2.0 * x[0])


def encoder() -> tuple[nn.Module, Tensor]:
    return Encoder(False), torch.randn(3, 4, 6)


def encoder_sequence_first() -> tuple[nn.Module, Tensor]:
    return Encoder(True), torch.randn(4, 4, 6)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: bool | int) -> None:
        super().__init__()
        self.rnn = kind(3, 5, **options)
        self.head = head(5 * (1 + self.rnn.bidirectional), 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.rnn.batch_first:
            return self.head(3.0 * self.rnn(x.transpose(0, 1))[0][-1])
        return self.head(3.0 * self.rnn(x)[0].mean(1))


def lstm() -> tuple[nn.Module, Tensor]:
    return Recurrent(nn.LSTM, batch_first=True), torch.randn(3, 4, 3)


def gru() -> tuple[nn.Module, Tensor]:
    return Recurrent(nn.GRU), torch.randn(4, 4, 3)


def bidirectional_lstm() -> tuple[nn.Module, Tensor]:
    options = {"batch_first": True, "bidirectional": True, "num_layers": 2}
    return Recurrent(nn.LSTM, **options), torch.randn(3, 4, 3)


class Packed(nn.Module):
    """Sequences of several lengths, packed: rows of all samples are interleaved by time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.rnn = nn.GRU(5, 5, batch_first=True)
        self.head = head(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + (x[:, 0, 0] > 0).long() + 2 * (x[:, 0, 1] > 0).long()
        tokens = torch.tanh(self.embed(x))
        packed = pack_padded_sequence(
            tokens, lengths.detach().cpu(), batch_first=True, enforce_sorted=False
        )
        return self.head(3.0 * self.rnn(packed)[1][0])


def packed_gru() -> tuple[nn.Module, Tensor]:
    return Packed(), torch.randn(4, 4, 3)


class Tokens(nn.Module):
    """Token ids to logits: an embedding's mean."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, **options)
        self.hidden = nn.Linear(6, 6)
        self.head = head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(2.0 * self.embed(x).mean(1))))


def ids(batch: int = 4, length: int = 6, low: int = 0) -> Tensor:
    """Token ids with repetitions within a sample."""
    x = torch.randint(low, 11, (batch, length))
    x[:, 1] = x[:, 0]
    return x


def embedding() -> tuple[nn.Module, Tensor]:
    return Tokens(), ids()


def embedding_padding() -> tuple[nn.Module, Tensor]:
    x = ids()
    x[:, -2:] = 2
    return Tokens(padding_idx=2), x


def embedding_sparse() -> tuple[nn.Module, Tensor]:
    return Tokens(sparse=True), ids()


class Bag(nn.Module):
    """nn.EmbeddingBag on ids [B, T], or on all of them in one line with offsets."""

    def __init__(self, mode: str, flat: bool = False, weighted: bool = False, **options: object):
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 6, mode=mode, **options)
        self.flat = flat
        self.importance = nn.Parameter(torch.rand(11) + 0.5) if weighted else None
        self.head = head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        weights = None if self.importance is None else self.importance[x]
        if self.flat:
            offsets = torch.arange(x.shape[0]) * x.shape[1]
            return self.head(self.bag(x.flatten(), offsets))
        return self.head(self.bag(x, per_sample_weights=weights))


BAGS = {
    "embedding_bag_sum": lambda: (Bag("sum"), ids()),
    "embedding_bag_mean": lambda: (Bag("mean"), ids()),
    "embedding_bag_max": lambda: (Bag("max"), ids()),
    "embedding_bag_offsets": lambda: (Bag("mean", flat=True), ids()),
    "embedding_bag_padding": lambda: (Bag("mean", padding_idx=3), ids(length=9)),
    "embedding_bag_weighted": lambda: (Bag("sum", weighted=True), ids()),
    "embedding_bag_sparse": lambda: (Bag("sum", sparse=True), ids()),
}


class Windows(nn.Module):
    """Swin's windows: [B, H, W, C] becomes [B * windows, tokens, C]; with the continuous position
    bias of its second version, a small network of a table that has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(3, 6)
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.bias = nn.Sequential(nn.Linear(2, 5), nn.ReLU(inplace=True), nn.Linear(5, 1))
        at = torch.stack(torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij"))
        self.register_buffer("offsets", (at.flatten(1)[:, :, None] - at.flatten(1)[:, None]))
        self.head = head(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x.permute(0, 2, 3, 1))  # [B, 4, 4, 6]
        batch = x.shape[0]
        windows = x.view(batch, 2, 2, 2, 2, 6).transpose(2, 3).reshape(-1, 4, 6)
        q, k, v = self.qkv(self.norm(windows)).chunk(3, 2)
        bias = self.bias(self.offsets.permute(1, 2, 0)).squeeze(2)  # [4, 4]
        attention = (q @ k.mT / 6**0.5 + bias).softmax(2)
        windows = windows + self.out(attention @ v)
        return self.head(2.0 * windows.view(batch, -1, 6)[:, ::3].mean(1))


def swin() -> tuple[nn.Module, Tensor]:
    return Windows(), torch.randn(4, 3, 4, 4)  # as many windows and tokens as samples


class PositionMajor(nn.Module):
    """Rows sorted by position, then by sample: [B, T, C] becomes [T * B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6)
        self.head = head(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        rows = x.transpose(0, 1).reshape(length * batch, -1)
        rows = self.second(F.relu(self.norm(self.first(rows)), inplace=True))
        return self.head(torch.tanh(rows.view(length, batch, -1)).sum(0))


def position_major() -> tuple[nn.Module, Tensor]:
    return PositionMajor(), torch.randn(3, 5, 3)


def position_major_square() -> tuple[nn.Module, Tensor]:
    return PositionMajor(), torch.randn(4, 4, 3)


class InPlaceTokens(nn.Module):
    """An in-place ReLU on the output of a Linear that saw [B, T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)
        self.head = head(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = F.relu_(self.second(x))
        return self.head(x.mean(1))


def in_place_tokens() -> tuple[nn.Module, Tensor]:
    return InPlaceTokens(), torch.randn(3, 4, 3)


BUILDERS = {
    f.__name__: f
    for f in (vit, vit_sequence_first, cross_attention, encoder, encoder_sequence_first, lstm, gru)
}
BUILDERS |= {f.__name__: f for f in (bidirectional_lstm, packed_gru, embedding, embedding_padding)}
BUILDERS |= {f.__name__: f for f in (embedding_sparse, swin, position_major)}
BUILDERS |= {f.__name__: f for f in (position_major_square, in_place_tokens)}
BUILDERS |= BAGS
