"""From logits to what the cache stores: the k most likely ids, the log-mass of the rest, and draws."""

import torch


def top_k_and_tail(logits: torch.Tensor, k: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The k most likely ids, their log-probabilities and the log-mass of all others, in one visit that overwrites
    `logits`: the kept entries are taken out, the rest is exponentiated in place relative to its own maximum. The tail
    therefore comes from the logits themselves and not from `1 - sum`, which is rounding noise when the tail is small,
    and it neither cancels nor underflows.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`): float32 or float64; overwritten.
        k (`int`): Entries to keep.
        num_tokens (`int`): Ids that may be kept; the rest of the vocabulary counts as tail.

    Returns:
        `tuple`: ids `(N, k)` int32, most likely first and equal values by rising id; log-probabilities `(N, k)`; tail
        log-mass `(N,)`, `-inf` where nothing is left. A row with NaN or +inf logits comes out with NaN.
    """
    allowed = logits[:, :num_tokens]
    more = min(k + 1, num_tokens)
    values, ids = allowed.topk(more, dim=-1)
    if more > k:
        tied = (values[:, k - 1] == values[:, k]).nonzero().squeeze(-1)
        if len(tied):
            ids[tied, :k] = _lowest_ids(allowed[tied], values[tied, :k], ids[tied, :k])
    # Without a padded head the largest of the rest is the k+1-st value, and needs no pass of its own
    largest = values[:, k:] if more > k and num_tokens == logits.shape[1] else None
    values, ids = values[:, :k], ids[:, :k]
    # `topk` orders equal values as it likes; the cache orders them by id
    by_id = ids.argsort(dim=-1)
    values, ids = values.gather(-1, by_id), ids.gather(-1, by_id)
    by_value = values.argsort(dim=-1, descending=True, stable=True)
    values, ids = values.gather(-1, by_value), ids.gather(-1, by_value)

    rest = logits.scatter_(-1, ids, -torch.inf)
    largest = rest.amax(-1, keepdim=True) if largest is None else largest
    # A row with nothing left has maximum -inf, and -inf minus -inf would be NaN
    tail = rest.sub_(largest.clamp(min=torch.finfo(rest.dtype).min)).exp_().sum(-1).log() + largest.squeeze(-1)
    total = torch.logaddexp(values.logsumexp(-1), tail)
    # Rounding can leave a log-probability or a tail of 1 + 1e-7
    return ids.int(), (values - total[:, None]).clamp(max=0), (tail - total).clamp(max=0)


def _lowest_ids(allowed: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """
    Kept ids of rows whose k-th value occurs more than once: the ids above it as they are, then the lowest ids that
    hold it. Reduced-precision logits tie often, so this is no sort of the vocabulary.
    """
    threshold = values[:, -1:]
    row, column = (allowed == threshold).nonzero(as_tuple=True)
    starts = torch.searchsorted(row, torch.arange(len(allowed), device=row.device))
    place = (values > threshold).sum(-1)[row] + torch.arange(len(row), device=row.device) - starts[row]
    fits = place < ids.shape[1]
    ids = ids.clone()
    ids[row[fits], place[fits]] = column[fits]
    return ids


def draw_ids(logits: torch.Tensor, uniforms: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Draws with replacement from the softmax over the first `num_tokens` ids, by inversion: the result depends on the
    logits and the uniforms alone, not on how rows were batched.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`): Left as they are.
        uniforms (`torch.Tensor` of shape `(N, draws)`): Uniform in [0, 1), on any device.
        num_tokens (`int`): Ids that can be drawn.

    Returns:
        `torch.Tensor` of shape `(N, draws)`, int32.
    """
    allowed = logits[:, :num_tokens]
    # float64 where the device has it: in float32 the running sum over a large vocabulary would lose rare tokens
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = (allowed - allowed.amax(-1, keepdim=True)).to(dtype).exp_().cumsum(-1)
    uniforms = uniforms.to(dtype).to(logits.device)
    drawn = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return drawn.clamp(max=num_tokens - 1).int()
