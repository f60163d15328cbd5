"""Attention by whole products: one block of queries at a time, and one pass over its scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels.dropout import Mask
from veneer.kernels.native import kernel

# Queries of a block: smaller blocks skip more of the keys that none of their queries sees, larger
# ones make better products.
QUERY_BLOCK = 256
# Scores held at a time: fewer stay in the cache, more make better products.
SCORES_AT_ONCE = 2**21


@dataclass(frozen=True)
class ScoreBlocks:
    """softmax(t) v with t = scale · q kᵀ, or t = softcap · tanh(scale · q kᵀ / softcap), where
    every query sees the keys up to its own position, and of those the last `window`.

    q and y are (sequences, length, heads, dim), k and v (sequences, keys, kv_heads, dim); v's dim
    may be another than q's and k's. The last query is at the last key: where there are more keys
    than queries, these come before the first. The queries of all heads that share a key head are
    rows of one product. dropout: what multiplies the probabilities; each block has a mask of its
    own.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: Mask | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return y, and log Σ exp of t (sequences, heads, length) in float32 or wider."""
        sequences, keys_in_all, kv_heads = k.shape[:3]
        length = q.shape[1]
        before = keys_in_all - length
        q_rows, k_rows, v_rows = (by_key_head(x, kv_heads) for x in (q, k, v))
        k_rows, v_rows = k_rows.squeeze(1), v_rows.squeeze(1)
        shared = q_rows.shape[1]
        y_rows = v_rows.new_empty(*q_rows.shape[:3], v.shape[3])
        wide = torch.promote_types(q.dtype, torch.float32)
        log_sums = torch.empty(q_rows.shape[:3], dtype=wide, device=q.device)
        buffers = self._buffers(q_rows, before, 2)
        blocks = self._blocks(*q_rows.shape[:3], before=before)
        for number, (heads, queries, keys) in enumerate(blocks):
            block_q = q_rows[heads, :, queries].flatten(1, 2)  # (heads, shared · queries, dim)
            scores = _scores(block_q, k_rows[heads, keys], buffers)
            self._softmax(
                *scores, log_sums[heads].flatten(0, 1), queries.start, keys.start - before
            )
            self._drop_(scores[0], number)
            y = scores[0] @ v_rows[heads, keys]
            y_rows[heads, :, queries] = y.unflatten(1, (shared, -1))
        if self.dropout is not None:
            y_rows *= self.dropout.scale
        y = y_rows.unflatten(0, (sequences, kv_heads)).flatten(
            1, 2
        )  # (sequences, heads, length, dim)
        return y.transpose(1, 2), log_sums.view(sequences, -1, length)

    def backward(
        self, dy: Tensor, delta: Tensor, log_sums: Tensor, leaks: Tensor | None, *qkv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, and dk and dv in float32 or wider.

        Probabilities p = exp(t − log_sums) are computed again, and then

            dv = pᵀ dy    dp = dy vᵀ    ds = t′ · p ∘ (dp − delta)    dq = ds k    dk = dsᵀ q

        with delta = Σ dy ∘ y, (sequences, length, heads), and t′ = scale · (1 − tanh²) or scale.
        A mask of dropout multiplies the p of dv, and dp. leaks: the probability that no key has,
        (sequences, heads, length), or None where every row of p sums to 1.

        Without a soft cap ds multiplies k without the mean key, lest an offset that all keys share
        (as Qwen2's biases give them) multiplies the rounding of ds. It takes (Σ ds) · mean key from
        dq, where Σ ds = scale · delta · leaks.
        """
        q, k, v = qkv
        sequences, keys_in_all, kv_heads = k.shape[:3]
        before = keys_in_all - q.shape[1]
        q_rows, k_rows, v_rows, dy_rows = (by_key_head(x, kv_heads) for x in (q, k, v, dy))
        k_rows, v_rows = k_rows.squeeze(1), v_rows.squeeze(1)
        shared, wide = q_rows.shape[1], delta.dtype
        if self.dropout is not None:
            dy_rows = dy_rows * self.dropout.scale
        delta = delta.transpose(1, 2).contiguous().view(q_rows.shape[:3])
        log_sums = log_sums.contiguous().view(q_rows.shape[:3])
        mean_key, centred = None, k_rows
        if self.softcap is None:
            mean_key = k_rows.mean(1, keepdim=True, dtype=wide)  # (sequences · kv_heads, 1, dim)
            centred = (k_rows - mean_key).to(k.dtype)
        dq_rows = torch.empty_like(q_rows)  # (sequences · kv_heads, shared, length, dim)
        # Transposed, (sequences · kv_heads, dim, length): those products are faster.
        dk_columns, dv_columns = (
            torch.zeros_like(x.transpose(1, 2), dtype=wide, memory_format=torch.contiguous_format)
            for x in (k_rows, v_rows)
        )
        *buffers, dp_buffer = self._buffers(q_rows, before, 3)
        blocks = self._blocks(*q_rows.shape[:3], before=before)
        for number, (heads, queries, keys) in enumerate(blocks):
            block_q, block_dy = (x[heads, :, queries].flatten(1, 2) for x in (q_rows, dy_rows))
            block_k, block_v = k_rows[heads, keys], v_rows[heads, keys]
            scores, rest = _scores(block_q, block_k, buffers)  # (…, shared · queries, keys)
            dp = _of_shape(dp_buffer, *scores.shape)
            torch.bmm(block_dy, block_v.transpose(1, 2), out=dp)
            self._drop_(dp, number)
            own_log_sums, own_delta = (x[heads].flatten(0, 1) for x in (log_sums, delta))
            at = queries.start, keys.start - before
            p, ds = self._gradient(scores, rest, dp, own_log_sums, own_delta, *at)
            dq_rows[heads, :, queries] = (ds @ centred[heads, keys]).unflatten(1, (shared, -1))
            dk_columns[heads, :, keys] += block_q.transpose(1, 2) @ ds
            self._drop_(p, number)
            dv_columns[heads, :, keys] += block_dy.transpose(1, 2) @ p
        if mean_key is not None and leaks is not None:
            sums = self.scale * delta * leaks.reshape(delta.shape)
            dq_rows += sums[..., None] * mean_key[:, None]
        dk, dv = (
            x.unflatten(0, (sequences, kv_heads)).permute(0, 3, 1, 2)
            for x in (dk_columns, dv_columns)
        )
        dq = dq_rows.unflatten(0, (sequences, kv_heads)).flatten(1, 2)
        return dq.transpose(1, 2), dk, dv

    def _blocks(
        self, heads: int, shared: int, length: int, *, before: int
    ) -> Iterator[tuple[slice, slice, slice]]:
        """Yield key heads, queries and the keys that these see, until all are done."""
        for queries, keys in query_blocks(length, self.window, QUERY_BLOCK, before):
            scores = shared * (queries.stop - queries.start) * (keys.stop - keys.start)
            at_once = max(1, SCORES_AT_ONCE // scores)
            for first in range(0, heads, at_once):
                yield slice(first, min(heads, first + at_once)), queries, keys

    def _drop_(self, scores: Tensor, number: int) -> None:
        """Multiply a block of that number with its mask, in place."""
        if self.dropout is not None:
            self.dropout.numbered(number).apply_(scores.flatten(0, 1))

    def _buffers(self, q_rows: Tensor, before: int, count: int) -> list[Tensor]:
        """Return room for the scores of the largest block, `count` times."""
        shared = q_rows.shape[1]
        sizes = (
            (heads.stop - heads.start)
            * shared
            * (queries.stop - queries.start)
            * (keys.stop - keys.start)
            for heads, queries, keys in self._blocks(*q_rows.shape[:3], before=before)
        )
        largest = max(sizes, default=0)
        return [q_rows.new_empty(largest) for _ in range(count)]

    def _softmax(
        self, scores: Tensor, rest: Tensor | None, log_sums: Tensor, start: int, first: int
    ) -> None:
        """Write p over scores (heads, shared · queries, keys), and log Σ exp t of the queries from
        `start` on into log_sums (heads · shared, length). The first key is `first`, counted from
        that of the query 0; it is negative where keys come before."""
        native = kernel("attention_softmax", scores)
        if native is not None:
            shape = self._shape(scores, log_sums, start, first)
            native(scores, rest, log_sums, *self._numbers(), *shape)
            return
        t, visible, rows = self._rows(scores, rest, log_sums, start, first)
        t, _ = self._capped(t)
        t = t.masked_fill(~visible, -torch.inf)
        log_sums[rows] = t.logsumexp(-1)
        scores.copy_(t.softmax(-1).view(scores.shape))

    def _gradient(
        self,
        scores: Tensor,
        rest: Tensor | None,
        dp: Tensor,
        log_sums: Tensor,
        delta: Tensor,
        start: int,
        first: int,
    ) -> tuple[Tensor, Tensor]:
        """Return p and ds, written over scores and dp; the arguments are those of `_softmax`."""
        native = kernel("attention_gradient", scores)
        if native is not None:
            shape = self._shape(scores, log_sums, start, first)
            native(scores, rest, dp, log_sums, delta, *self._numbers(), *shape)
            return scores, dp
        t, visible, rows = self._rows(scores, rest, log_sums, start, first)
        t, slope = self._capped(t)
        p = (t - log_sums[rows][..., None]).exp().masked_fill(~visible, 0.0)
        ds = slope * p * (dp.view(t.shape) - delta[rows][..., None])
        return p.to(scores.dtype).view(scores.shape), ds.to(dp.dtype).view(dp.shape)

    def _capped(self, scores: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return t and dt / dscores."""
        if self.softcap is None:
            return self.scale * scores, self.scale
        bent = torch.tanh(scores * (self.scale / self.softcap))
        return self.softcap * bent, self.scale * (1 - bent * bent)

    def _numbers(self) -> tuple[float, float]:
        return float(self.scale), float(self.softcap or 0)

    def _shape(self, scores: Tensor, log_sums: Tensor, start: int, first: int) -> tuple[int, ...]:
        heads, length = log_sums.shape
        queries = scores.shape[0] * scores.shape[1] // heads
        window = self.window or start + queries - first  # or all keys
        return heads, queries, scores.shape[2], length, start, first, window

    def _rows(
        self, scores: Tensor, rest: Tensor | None, log_sums: Tensor, start: int, first: int
    ) -> tuple[Tensor, Tensor, tuple[slice, slice]]:
        """Return scores as (heads, queries, keys) in a wide dtype, which of them are visible, and
        the indices of their rows in log_sums."""
        heads, queries, keys, *_ = self._shape(scores, log_sums, start, first)
        visible = visible_keys(
            slice(start, start + queries), slice(first, first + keys), self.window, scores.device
        )
        whole = scores.to(log_sums.dtype)
        if rest is not None:
            whole += rest
        t = whole.view(heads, queries, keys)
        return t, visible, (slice(None), slice(start, start + queries))


def query_blocks(
    length: int, window: int | None, size: int, before: int = 0
) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of at most `size` queries, and the keys that any query of the block sees.

    The first `before` keys come before the first query: query i sees the keys up to before + i.
    """
    for start in range(0, length, size):
        stop = min(length, start + size)
        first = 0 if window is None else max(0, before + start + 1 - window)
        yield slice(start, stop), slice(first, before + stop)


def visible_keys(
    queries: slice, keys: slice, window: int | None, device: torch.device, before: int = 0
) -> Tensor:
    """Return which keys (columns) each query (row) sees: those up to its own position, and of these
    the last `window`."""
    query = torch.arange(before + queries.start, before + queries.stop, device=device)
    distance = query[:, None] - torch.arange(keys.start, keys.stop, device=device)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """Return (sequences, length, heads, dim) as (sequences · kv_heads, shared, length, dim)."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _scores(q: Tensor, k: Tensor, buffers: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return q kᵀ, and what rounding to 16 bits left of it, or None for wider dtypes.

    A second product is added to the negative first before it is rounded itself. Both together are
    as exact as float32, and cost half of a product in float32.
    """
    shape = *q.shape[:2], k.shape[1]
    scores, rest = (_of_shape(x, *shape) for x in buffers)
    torch.bmm(q, k.transpose(1, 2), out=scores)
    if q.element_size() > 2:
        return scores, None
    rest.copy_(scores)
    return scores, rest.baddbmm_(q, k.transpose(1, 2), beta=-1)


def _of_shape(buffer: Tensor, *shape: int) -> Tensor:
    return buffer[: torch.Size(shape).numel()].view(shape)
