"""
Visits to the tokens in chunks: statistics and gradients of the sparse KL estimators, forward and backward in one go.

`project_chunks` goes through the whole vocabulary, `gather_chunks` only through the kept rows of the head, for estimators
that read no others.
"""

from dataclasses import dataclass

import torch

from .choice_scores import ChoiceScores
from .estimator import Estimator, Logits, Student, Target
from .products import HeadProducts
from .tiles import Tile, TorchTile, kernel_of


# Bytes of one chunk of logits. On a CPU, measured at V = 151,936 on two cores: 256 float32 rows are enough to keep the
# matrix products at full speed, and larger chunks only move more memory. A GPU wants more rows per product.
_CHUNK_BYTES = {"cpu": 160 * 2**20, "cuda": 2**30}
# Bytes of the rows that the point-wise work visits at a time, so that its passes hit the cache instead of memory.
_BLOCK_BYTES = {"cpu": 5 * 2**20, "cuda": 160 * 2**20}
_MAX_CHUNK_SIZE = 4096
# float16 gradients of improbable tokens would flush to zero (below 6e-8); probabilities times 2**10 stay in range.
_FLOAT16_GRADIENT_SCALE = 1024.0


def default_chunk_size(vocab_size: int, device: str = "cpu") -> int:
    """
    Tokens per chunk for which float32 logits of a chunk take about 160 MiB on a CPU and 1 GiB on a GPU.

    Args:
        vocab_size (`int`):
            Rows of the head.
        device (`str`, *optional*, defaults to `"cpu"`):
            Device type.

    Returns:
        `int`: a multiple of 32 in [32, 4096].
    """
    tokens = _CHUNK_BYTES["cpu" if device == "cpu" else "cuda"] // (vocab_size * 4)
    return min(max(tokens // 32 * 32, 32), _MAX_CHUNK_SIZE)


def tile_bytes(num_tokens: int, vocab_size: int, device: str, compute_dtype: torch.dtype) -> int:
    """
    Bytes of the tiles that [`project_chunks`] holds: one of logits that become their gradient with the Triton kernels of a
    GPU, float32 logits and room for the exponentials of a block on a CPU.

    Args:
        num_tokens (`int`): Supervised tokens of a forward.
        vocab_size (`int`): Rows of the head.
        device (`str`): Device type.
        compute_dtype (`torch.dtype`): Type of the projection: that of autocast, or of the weights.
    """
    chunk = max(min(default_chunk_size(vocab_size, device), num_tokens), 1)
    if device != "cpu":
        return chunk * vocab_size * compute_dtype.itemsize
    block = max(min(_BLOCK_BYTES["cpu"] // (vocab_size * 4), chunk), 1)
    return (chunk + block) * vocab_size * 4


@dataclass(frozen=True)
class FusedOptions:
    estimator: Estimator
    ce_weight: float
    scores: ChoiceScores
    logit_scale: float
    softcap: float | None
    chunk_size: int | None
    metrics: bool
    project: bool
    need_grad: bool
    compute_dtype: torch.dtype


Visited = tuple[dict[str, torch.Tensor], list[torch.Tensor | None], float]


def project_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: Target,
    options: FusedOptions,
    wanted: list[bool],
    dtype: torch.dtype,
) -> Visited:
    """Per-token statistics and gradients, through the whole vocabulary."""
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    device = hidden.device
    chunk_size = max(min(options.chunk_size or default_chunk_size(vocab_size, device.type), num_tokens), 1)
    block_bytes = _BLOCK_BYTES["cpu" if device.type == "cpu" else "cuda"]
    block_size = max(min(block_bytes // (vocab_size * dtype.itemsize), chunk_size), 1)
    products = HeadProducts(weight, options.compute_dtype, dtype)

    by_triton = kernel_of(device.type, dtype) == "triton"
    # The kernels work in registers: logits and gradient share a tile of the type that the products read
    logits = torch.empty((chunk_size, vocab_size), dtype=products.operand_dtype if by_triton else dtype, device=device)
    # The gradient replaces the logits where the products read their type, and is rounded into a copy elsewhere.
    gradients = (
        logits if logits.dtype == products.operand_dtype else torch.empty_like(logits, dtype=products.operand_dtype)
    )
    scale = _FLOAT16_GRADIENT_SCALE if products.operand_dtype == torch.float16 else 1.0
    if by_triton:
        block_size = chunk_size
    exponentials = None if by_triton else torch.empty((block_size, vocab_size), dtype=dtype, device=device)
    head_bias = None if bias is None else bias.to(dtype)
    make = torch.zeros if num_tokens == 0 else torch.empty
    grad_hidden = make(hidden.shape, dtype=dtype, device=device) if wanted[0] else None
    grad_weight = make(weight.shape, dtype=dtype, device=device) if wanted[1] else None
    grad_bias = torch.zeros((vocab_size,), dtype=dtype, device=device) if wanted[2] else None

    columns: dict[str, torch.Tensor] = {}
    for start in range(0, num_tokens, chunk_size):
        end = min(start + chunk_size, num_tokens)
        chunk = hidden[start:end].to(options.compute_dtype).to(products.operand_dtype)
        tile, gradient = logits[: end - start], gradients[: end - start]
        products.project(chunk, tile)
        for top in range(0, end - start, block_size):
            block = slice(top, min(top + block_size, end - start))
            rows = slice(start + block.start, start + block.stop)
            raw = tile[block]
            part: Tile
            if exponentials is None:
                # Imported here: triton is there on GPUs alone
                from .kernels import TritonTile

                part = TritonTile(raw, head_bias, options.logit_scale, options.softcap)
            else:
                part = TorchTile(raw, exponentials[: len(raw)], head_bias, options.logit_scale, options.softcap)
            wanted_part = gradient[block] if any(wanted) else None
            values = _visit(part, wanted_part, targets.rows(rows), options, scale)
            _store(columns, rows, values, targets)
        if grad_hidden is not None:
            products.back_to_hidden(gradient, grad_hidden[start:end])
        if grad_weight is not None:
            products.back_to_weight(gradient, chunk, grad_weight, accumulate=start > 0)
        if grad_bias is not None:
            grad_bias += gradient.sum(0, dtype=dtype)
    return columns, [grad_hidden, grad_weight, grad_bias], scale


def _store(columns: dict[str, torch.Tensor], rows: slice, values: dict[str, torch.Tensor], targets: Target) -> None:
    # One tensor per statistic from the start: many small live tensors between the large temporary ones fragment the
    # heap, chunk after chunk.
    for name, part in values.items():
        columns.setdefault(name, torch.empty_like(targets.total))[rows] = part


def _visit(
    tile: Tile, gradient: torch.Tensor | None, targets: Target, options: FusedOptions, scale: float
) -> dict[str, torch.Tensor]:
    """
    Statistics of some rows; writes `scale` times the gradient of their raw logits to `gradient`, which may be the tile
    itself.
    """
    ids, labels = targets.ids, targets.labels
    over_kept = options.estimator.over_kept
    rows = tile.read(ids, labels, entropy=options.metrics and not over_kept)
    log_tail = rows.tail_max + rows.tail_sum.log()
    log_kept = rows.kept_logits.masked_fill(~targets.kept, -torch.inf).logsumexp(-1)
    log_z = torch.logaddexp(log_tail, log_kept)
    student = Student(rows.kept_logits - log_z[:, None], rows.kept_logits - log_kept[:, None], log_tail - log_z)
    columns = {"kl": options.estimator.divergence(student, targets), "mass_outside": student.log_tail.exp()}
    if rows.label_logits is not None:
        best = torch.maximum(rows.tail_max, rows.kept_logits.amax(-1))
        columns["cross_entropy"] = log_z - rows.label_logits
        columns["num_correct"] = (rows.label_logits >= best).to(log_z.dtype)
    if options.scores:
        columns["choice_score"] = options.scores.value(student.log_q, targets)
    if options.metrics:
        log_own = student.log_q if over_kept else student.log_p
        entropy = -torch.where(targets.kept, log_own.exp() * log_own, 0.0).sum(-1)
        if not over_kept:
            assert rows.tail_weighted is not None
            # The tail's share is the sum of p * (log_z - logits), with p = exp(logits - tail_max) * exp(tail_max - log_z)
            entropy += (rows.tail_max - log_z).exp() * (rows.tail_sum * log_z - rows.tail_weighted)
        columns["student_entropy"] = entropy
    if gradient is None:
        return columns

    w = options.ce_weight
    # Per row: exp(logits - tail_max) * to_p is p on the tail
    to_p = (rows.tail_max - log_z).exp()
    logits = Logits(rows.kept_logits, log_tail, rows.tail_sum, to_p)
    on_kept, on_tail = map(targets.weighted, options.estimator.gradient(logits, student, targets))
    if w > 0:
        on_kept, on_tail = (1 - w) * on_kept + w * student.log_p.exp(), (1 - w) * on_tail + w * to_p
    if options.scores:
        on_kept = on_kept + options.scores.gradient(student.log_q, targets)
    on_kept = on_kept.gather(1, targets.slots) * scale
    tile.write(gradient, ids, on_kept, on_tail * scale, labels if w > 0 else None, -w * scale)
    return columns


def gather_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: Target,
    options: FusedOptions,
    wanted: list[bool],
    dtype: torch.dtype,
) -> Visited:
    """Per-token statistics and gradients of an estimator over the kept ids, from their rows of the head only."""
    num_tokens, hidden_size = hidden.shape
    k = targets.ids.shape[1]
    chunk_size = options.chunk_size or max(_CHUNK_BYTES["cpu"] // (4 * k * hidden_size * dtype.itemsize), 1)
    grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if wanted[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=hidden.device) if wanted[1] else None
    grad_bias = torch.zeros((weight.shape[0],), dtype=dtype, device=hidden.device) if wanted[2] else None

    columns: dict[str, torch.Tensor] = {}
    for start in range(0, num_tokens, chunk_size):
        end = min(start + chunk_size, num_tokens)
        visited = targets.rows(slice(start, end))
        flat_ids = visited.ids.reshape(-1)
        # Both sides are rounded to the compute type, as the projection rounds them, and multiplied in `dtype`.
        chunk = hidden[start:end].to(options.compute_dtype).to(dtype)
        rows = weight.index_select(0, flat_ids).to(options.compute_dtype).to(dtype).view(end - start, k, hidden_size)
        logits = torch.bmm(rows, chunk[:, :, None])[:, :, 0]
        if bias is not None:
            logits += bias[visited.ids].to(dtype)
        logits *= options.logit_scale
        if options.softcap is not None:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        log_q = logits.masked_fill(~visited.kept, -torch.inf).log_softmax(-1)
        unknown = torch.full_like(visited.total, torch.nan)
        student = Student(unknown[:, None].expand_as(log_q), log_q, unknown)
        values = {"kl": options.estimator.divergence(student, visited)}
        if options.scores:
            values["choice_score"] = options.scores.value(student.log_q, visited)
        if options.metrics:
            values["student_entropy"] = -torch.where(visited.kept, log_q.exp() * log_q, 0.0).sum(-1)
        _store(columns, slice(start, end), values, targets)
        if not any(wanted):
            continue

        gradient, _ = options.estimator.gradient(Logits(logits, unknown, unknown, unknown), student, visited)
        gradient = visited.weighted(gradient)
        if options.scores:
            gradient = gradient + options.scores.gradient(student.log_q, visited)
        if options.softcap is not None:
            gradient *= 1 - (logits / options.softcap).square()
        gradient *= options.logit_scale
        if grad_hidden is not None:
            torch.bmm(gradient[:, None], rows, out=grad_hidden[start:end, None])
        if grad_weight is not None:
            outer = torch.mul(gradient[:, :, None], chunk[:, None], out=rows)
            grad_weight.index_add_(0, flat_ids, outer.view(-1, hidden_size))
        if grad_bias is not None:
            grad_bias.index_add_(0, flat_ids, gradient.reshape(-1))
    return columns, [grad_hidden, grad_weight, grad_bias], 1.0
