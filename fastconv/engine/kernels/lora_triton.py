"""The Triton kernels of stacked layers; `lora_launch` launches them.

Import it only where triton is installed and a GPU or its interpreter can run it. Every kernel program works on a token
range of one slot: a table row (slot, start, stop). Ranks differ between slots (0 if the slot's adapter does not target
the module), so they are padded to RF (frozen part) and RT (trainable part), and the padding reads as zero. `places`
[modules, slots, 8] int64 has for each slot the addresses of A and B of the frozen part, of A and B of the trainable part,
and of the gradients of the latter, then both ranks. What reads a layer's input does so once for all MODULES that share
it. Products are accumulated in fp32 in a fixed order, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false


@triton.jit
def _keep(seeds, columns, salt, threshold):
    """`lora.keep_mask` for seeds [M] and columns [N], as booleans [M, N]: the same bits.

    (s ^ c) ^ (s ^ c) >> 16 is (s ^ s >> 16) ^ (c ^ c >> 16), so the first step is for rows and columns, not for elements."""
    seeds, channels = seeds.to(tl.uint32), columns.to(tl.uint32) * 0x9E3779B1 + salt.to(tl.uint32)
    bits = (seeds ^ (seeds >> 16))[:, None] ^ (channels ^ (channels >> 16))[None, :]
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15)
    bits = bits * 0x846CA68B
    bits = bits ^ (bits >> 16)
    return (bits & 0xFFFFFF) >= threshold.to(tl.uint32)


@triton.jit
def _weights(places, slot, at: tl.constexpr, element: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in column `at` of a slot's places, as a pointer to elements of this type."""
    weights = tl.load(places + slot * 8 + at).to(tl.pointer_type(element))
    if ALIGNED:
        weights = tl.multiple_of(weights, 16)
    return weights


@triton.jit
def _ranks(places, slot, ALIGNED: tl.constexpr):
    """A slot's frozen and trainable rank for this module. Triton loads vectors only if it knows that they are
    aligned."""
    rank_f, rank_t = tl.load(places + slot * 8 + 6), tl.load(places + slot * 8 + 7)
    if ALIGNED:
        rank_f, rank_t = tl.multiple_of(rank_f, 8), tl.multiple_of(rank_t, 8)
    return rank_f, rank_t


@triton.jit
def _columns_by_rank(weights, ks, n_k, rank, PADDED: tl.constexpr, ACROSS: tl.constexpr):
    """A tile [K, PADDED] of A [rank, n_k] transposed, or with ACROSS of B [n_k, rank] as it lies."""
    ranks = tl.arange(0, PADDED)
    if ACROSS:
        where = ks.to(tl.int64)[:, None] * rank + ranks[None, :]
    else:
        where = ranks.to(tl.int64)[None, :] * n_k + ks[:, None]
    return tl.load(weights + where, mask=(ks < n_k)[:, None] & (ranks < rank)[None, :], other=0.0)


@triton.jit
def _rank_by_columns(weights, ns, n_n, rank, PADDED: tl.constexpr, ACROSS: tl.constexpr):
    """A tile [PADDED, N] of A [rank, n_n] as it lies, or with ACROSS of B [n_n, rank] transposed."""
    ranks = tl.arange(0, PADDED)
    if ACROSS:
        where = ns.to(tl.int64)[None, :] * rank + ranks[:, None]
    else:
        where = ranks.to(tl.int64)[:, None] * n_n + ns[None, :]
    return tl.load(weights + where, mask=(ns < n_n)[None, :] & (ranks < rank)[:, None], other=0.0)


@triton.jit
def _module(module, n_0, n_1, n_2):
    """(first column, columns) of a module whose outputs lie behind those of the modules before it."""
    first = tl.where(module == 0, 0, tl.where(module == 1, n_0, n_0 + n_1))
    return first, tl.where(module == 0, n_0, tl.where(module == 1, n_1, n_2))


@triton.jit
def _parts(
    places, slot, frozen_at: tl.constexpr, trained_at: tl.constexpr, element: tl.constexpr, ALIGNED: tl.constexpr
):
    """Pointers to a module's frozen and trainable weights in these columns of `places`, and the ranks."""
    rank_f, rank_t = _ranks(places, slot, ALIGNED)
    frozen, trained = (
        _weights(places, slot, frozen_at, element, ALIGNED),
        _weights(places, slot, trained_at, element, ALIGNED),
    )
    return frozen, trained, rank_f, rank_t


@triton.jit
def _shrink_tile(given, sums_f, sums_t, frozen, trained, rank_f, rank_t, ks, n_k, row_seeds, salt, threshold,
                 ACROSS: tl.constexpr, RF: tl.constexpr, RT: tl.constexpr, DROPS: tl.constexpr):  # fmt: skip
    """A module's sums with the products of a tile of x added."""
    if RF:
        weights = _columns_by_rank(frozen, ks, n_k, rank_f, RF, ACROSS)
        sums_f = tl.dot(given, weights, sums_f, input_precision="ieee")
    if RT:
        if DROPS:
            given = tl.where(_keep(row_seeds, ks, salt, threshold), given, 0.0)
        weights = _columns_by_rank(trained, ks, n_k, rank_t, RT, ACROSS)
        sums_t = tl.dot(given, weights, sums_t, input_precision="ieee")
    return sums_f, sums_t


@triton.jit
def _store_sums(out, sums_f, sums_t, live, RF: tl.constexpr, RT: tl.constexpr):
    if RF:
        tl.store(out + tl.arange(0, RF)[None, :], sums_f, mask=live[:, None])
    if RT:
        tl.store(out + RF + tl.arange(0, RT)[None, :], sums_t, mask=live[:, None])


@triton.jit(do_not_specialize=["salt_0", "salt_1", "salt_2", "n_tok", "n_slots"])
def shrink(x, partial, tiles, places, thresholds, seeds, salt_0, salt_1, salt_2, n_tok, n_slots, n_0, n_1, n_2, x_stride,
           FROZEN: tl.constexpr, TRAINED: tl.constexpr, ACROSS: tl.constexpr, RF: tl.constexpr, RT: tl.constexpr,
           DROPS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr, SPLIT: tl.constexpr,
           MODULES: tl.constexpr):  # fmt: skip
    """partial[split, t] [MODULES * (RF + RT)] = x[t, range of the split] @ [frozen; trainable]^T of each module, the
    trainable columns on the kept inputs alone. Modules (up to 3) share x [n_tok, n_0], which is read once; with ACROSS each
    has columns of its own in x [n_tok, n_0 + n_1 + n_2], and a program is for one of them. FROZEN and TRAINED are the
    columns of `places` to use."""
    SHARED: tl.constexpr = 1 if ACROSS else MODULES
    tile, split = tl.program_id(0), tl.program_id(1)
    slot, start, stop = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    if start < stop:
        rows = start + tl.arange(0, M)
        live = rows < stop
        element = x.dtype.element_ty
        row_seeds, threshold = start, start
        if DROPS:
            row_seeds = tl.load(seeds + rows, mask=live, other=0)
            threshold = tl.load(thresholds + slot)
        module = 0
        if ACROSS:
            module = tl.program_id(2)
            places += module * n_slots * 8
        frozen_0, trained_0, rank_f0, rank_t0 = _parts(places, slot, FROZEN, TRAINED, element, ALIGNED)
        sums_f0 = tl.zeros((M, RF if RF else 16), dtype=tl.float32)
        sums_t0 = tl.zeros((M, RT if RT else 16), dtype=tl.float32)
        if SHARED > 1:
            frozen_1, trained_1, rank_f1, rank_t1 = _parts(
                places + n_slots * 8, slot, FROZEN, TRAINED, element, ALIGNED
            )
            sums_f1, sums_t1 = tl.zeros_like(sums_f0), tl.zeros_like(sums_t0)
        if SHARED > 2:
            frozen_2, trained_2, rank_f2, rank_t2 = _parts(
                places + 2 * n_slots * 8, slot, FROZEN, TRAINED, element, ALIGNED
            )
            sums_f2, sums_t2 = tl.zeros_like(sums_f0), tl.zeros_like(sums_t0)
        out = partial + (split.to(tl.int64) * n_tok + rows)[:, None] * (MODULES * (RF + RT))
        x_rows = x + rows.to(tl.int64)[:, None] * x_stride
        n_k = n_0
        if ACROSS:
            first, n_k = _module(module, n_0, n_1, n_2)
            x_rows += first
            out += module * (RF + RT)
        for k in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, n_k), K):
            ks = k + tl.arange(0, K)
            given = tl.load(x_rows + ks[None, :], mask=live[:, None] & (ks < n_k)[None, :], other=0.0)
            sums_f0, sums_t0 = _shrink_tile(
                given, sums_f0, sums_t0, frozen_0, trained_0, rank_f0, rank_t0, ks, n_k, row_seeds, salt_0, threshold,
                ACROSS, RF, RT, DROPS,
            )  # fmt: skip
            if SHARED > 1:
                sums_f1, sums_t1 = _shrink_tile(
                    given, sums_f1, sums_t1, frozen_1, trained_1, rank_f1, rank_t1, ks, n_k, row_seeds, salt_1, threshold,
                    ACROSS, RF, RT, DROPS,
                )  # fmt: skip
            if SHARED > 2:
                sums_f2, sums_t2 = _shrink_tile(
                    given, sums_f2, sums_t2, frozen_2, trained_2, rank_f2, rank_t2, ks, n_k, row_seeds, salt_2, threshold,
                    ACROSS, RF, RT, DROPS,
                )  # fmt: skip
        _store_sums(out, sums_f0, sums_t0, live, RF, RT)
        if SHARED > 1:
            _store_sums(out + (RF + RT), sums_f1, sums_t1, live, RF, RT)
        if SHARED > 2:
            _store_sums(out + 2 * (RF + RT), sums_f2, sums_t2, live, RF, RT)


@triton.jit(do_not_specialize=["n_tok", "n_slots"])
def finish_shrink(partial, out, tiles, scales, n_tok, n_slots, RF: tl.constexpr, RT: tl.constexpr,
                  SPLITS: tl.constexpr, ROWS: tl.constexpr, MODULES: tl.constexpr):  # fmt: skip
    """out[t] = the scales of slot and module times the sum over splits of partial[split, t], in out's type."""
    tile = tl.program_id(0)
    slot, start, stop = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    rows = start + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = rows < stop
    WIDTH: tl.constexpr = MODULES * (RF + RT)
    for module in tl.static_range(MODULES):
        first = module * (RF + RT)
        scale = scales + (module * n_slots + slot) * 2
        if RF:
            _sum_splits(partial, out, rows, live, tl.load(scale), n_tok, first, RF, WIDTH, SPLITS, ROWS)
        if RT:
            _sum_splits(partial, out, rows, live, tl.load(scale + 1), n_tok, first + RF, RT, WIDTH, SPLITS, ROWS)


@triton.jit
def _sum_splits(partial, out, rows, live, scale, n_tok, FIRST: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
                SPLITS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    where = rows.to(tl.int64)[:, None] * WIDTH + (FIRST + tl.arange(0, N))[None, :]
    total = tl.zeros((ROWS, N), dtype=tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial + split * (n_tok.to(tl.int64) * WIDTH) + where, mask=live[:, None], other=0.0)
    tl.store(out + where, (total * scale).to(out.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["n_tok", "n_slots"])
def expand(xa, y, bias, tiles, places, n_tok, n_slots, n_0, n_1, n_2, xa_stride, y_stride, RF: tl.constexpr, RT: tl.constexpr, BIASED: tl.constexpr,
           ALIGNED: tl.constexpr, ADDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """y[t] = xa[t] @ [B frozen | B trainable]^T, plus the bias if BIASED, plus what y held if ADDS."""
    tile, module = tl.program_id(0), tl.program_id(2)
    slot, start, stop = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    first, n_out = _module(module, n_0, n_1, n_2)
    if (start < stop) & (tl.program_id(1) * N < n_out):
        places += module * n_slots * 8
        rows = start + tl.arange(0, M)
        live = rows < stop
        columns = tl.program_id(1) * N + tl.arange(0, N)
        element = xa.dtype.element_ty
        rank_f, rank_t = _ranks(places, slot, ALIGNED)
        sums = tl.zeros((M, N), dtype=tl.float32)
        xa_rows = xa + module * (RF + RT) + rows.to(tl.int64)[:, None] * xa_stride
        if RF:
            frozen = _rank_by_columns(_weights(places, slot, 1, element, ALIGNED), columns, n_out, rank_f, RF, True)
            given = tl.load(xa_rows + tl.arange(0, RF)[None, :], mask=live[:, None], other=0.0)
            sums = tl.dot(given, frozen, sums, input_precision="ieee")
        if RT:
            trained = _rank_by_columns(_weights(places, slot, 3, element, ALIGNED), columns, n_out, rank_t, RT, True)
            given = tl.load(xa_rows + RF + tl.arange(0, RT)[None, :], mask=live[:, None], other=0.0)
            sums = tl.dot(given, trained, sums, input_precision="ieee")
        inside = live[:, None] & (columns < n_out)[None, :]
        where = y + first + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
        if BIASED:
            sums += tl.load(bias + first + columns, mask=columns < n_out, other=0.0).to(tl.float32)[None, :]
        if ADDS:
            sums += tl.load(where, mask=inside, other=0.0).to(tl.float32)
        tl.store(where, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _input_weights(places, slot, columns, n_in, element: tl.constexpr, RF: tl.constexpr, RT: tl.constexpr,
                   WANTS_X: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """A module's tiles of A [RF, N] and [RT, N], and its trainable rank."""
    rank_f, rank_t = _ranks(places, slot, ALIGNED)
    frozen, trained = columns, columns  # stand in for what is not read
    if WANTS_X:
        if RF:
            frozen = _rank_by_columns(_weights(places, slot, 0, element, ALIGNED), columns, n_in, rank_f, RF, False)
        if RT:
            trained = _rank_by_columns(_weights(places, slot, 2, element, ALIGNED), columns, n_in, rank_t, RT, False)
    return frozen, trained, rank_t


@triton.jit
def _input_tile(change, sums, x, where, inside, dxa_rows, live, frozen, trained, row_seeds, columns, salt, threshold,
                RF: tl.constexpr, RT: tl.constexpr, DROPS: tl.constexpr, WANTS_X: tl.constexpr, WANTS_A: tl.constexpr):  # fmt: skip
    """`change` [M, N] of dx and `sums` [N, RT] of A's gradient with a module's share of a tile of tokens added."""
    if RT:
        given_t = tl.load(dxa_rows + RF + tl.arange(0, RT)[None, :], mask=live[:, None], other=0.0)
        if DROPS:
            keep = _keep(row_seeds, columns, salt, threshold)
    if WANTS_X:
        if RT:
            if DROPS:
                change += tl.where(keep, tl.dot(given_t, trained, input_precision="ieee"), 0.0)
            else:
                change = tl.dot(given_t, trained, change, input_precision="ieee")
        if RF:
            given_f = tl.load(dxa_rows + tl.arange(0, RF)[None, :], mask=live[:, None], other=0.0)
            change = tl.dot(given_f, frozen, change, input_precision="ieee")
    if WANTS_A:
        kept = tl.load(x + where, mask=inside, other=0.0)
        if DROPS:
            kept = tl.where(keep, kept, 0.0)
        sums = tl.dot(tl.trans(kept), given_t, sums, input_precision="ieee")
    return change, sums


@triton.jit
def _store_gradient(partial, sums, chunk, rank_t, columns, n_in, RT: tl.constexpr):
    ranks = tl.arange(0, RT)
    out = partial + chunk.to(tl.int64) * RT * n_in + ranks.to(tl.int64)[:, None] * n_in + columns[None, :]
    tl.store(out, tl.trans(sums), mask=(ranks < rank_t)[:, None] & (columns < n_in)[None, :])


@triton.jit(do_not_specialize=["salt_0", "salt_1", "salt_2", "n_tok", "n_slots"])
def input_side(x, dxa, dx, partial, chunks, places, thresholds, seeds, salt_0, salt_1, salt_2, n_tok, n_slots, n_in,
               RF: tl.constexpr, RT: tl.constexpr, DROPS: tl.constexpr, WANTS_X: tl.constexpr, WANTS_A: tl.constexpr,
               ALIGNED: tl.constexpr, ADDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
               MODULES: tl.constexpr):  # fmt: skip
    """Both gradients that need the mask, computed once, over all modules: dx[t] = the sum of dxa_f A_f + kept(dxa_t A_t)
    (plus what dx held if ADDS), and partial[module, chunk] [rank, n_in] = the sum over the chunk's tokens of
    dxa_t^T kept(x)."""
    chunk = tl.program_id(0)
    slot, start, stop = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1), tl.load(chunks + chunk * 3 + 2)
    if start < stop:
        columns = tl.program_id(1) * N + tl.arange(0, N)
        in_width = columns < n_in
        element = x.dtype.element_ty
        row_seeds, threshold = start + tl.arange(0, M), start
        if DROPS:
            threshold = tl.load(thresholds + slot)
        frozen_0, trained_0, rank_0 = _input_weights(places, slot, columns, n_in, element, RF, RT, WANTS_X, ALIGNED)
        sums_0 = tl.zeros((N, RT if RT else 16), dtype=tl.float32)
        if MODULES > 1:
            frozen_1, trained_1, rank_1 = _input_weights(
                places + n_slots * 8, slot, columns, n_in, element, RF, RT, WANTS_X, ALIGNED
            )
            sums_1 = tl.zeros_like(sums_0)
        if MODULES > 2:
            frozen_2, trained_2, rank_2 = _input_weights(
                places + 2 * n_slots * 8, slot, columns, n_in, element, RF, RT, WANTS_X, ALIGNED
            )
            sums_2 = tl.zeros_like(sums_0)
        for first in range(start, stop, M):
            rows = first + tl.arange(0, M)
            live = rows < stop
            inside = live[:, None] & in_width[None, :]
            where = rows.to(tl.int64)[:, None] * n_in + columns[None, :]
            dxa_rows = dxa + rows.to(tl.int64)[:, None] * (MODULES * (RF + RT))
            if DROPS:
                row_seeds = tl.load(seeds + rows, mask=live, other=0)
            change = tl.zeros((M, N), dtype=tl.float32)
            change, sums_0 = _input_tile(
                change, sums_0, x, where, inside, dxa_rows, live, frozen_0, trained_0, row_seeds, columns, salt_0,
                threshold, RF, RT, DROPS, WANTS_X, WANTS_A,
            )  # fmt: skip
            if MODULES > 1:
                change, sums_1 = _input_tile(
                    change, sums_1, x, where, inside, dxa_rows + (RF + RT), live, frozen_1, trained_1, row_seeds, columns,
                    salt_1, threshold, RF, RT, DROPS, WANTS_X, WANTS_A,
                )  # fmt: skip
            if MODULES > 2:
                change, sums_2 = _input_tile(
                    change, sums_2, x, where, inside, dxa_rows + 2 * (RF + RT), live, frozen_2, trained_2, row_seeds,
                    columns, salt_2, threshold, RF, RT, DROPS, WANTS_X, WANTS_A,
                )  # fmt: skip
            if WANTS_X:
                if ADDS:
                    change += tl.load(dx + where, mask=inside, other=0.0).to(tl.float32)
                tl.store(dx + where, change.to(dx.dtype.element_ty), mask=inside)
        if WANTS_A:
            of_module = tl.num_programs(0).to(tl.int64) * RT * n_in
            _store_gradient(partial, sums_0, chunk, rank_0, columns, n_in, RT)
            if MODULES > 1:
                _store_gradient(partial + of_module, sums_1, chunk, rank_1, columns, n_in, RT)
            if MODULES > 2:
                _store_gradient(partial + 2 * of_module, sums_2, chunk, rank_2, columns, n_in, RT)


@triton.jit(do_not_specialize=["n_tok", "n_slots"])
def output_side(dy, xa, partial, chunks, places, n_tok, n_slots, n_0, n_1, n_2, dy_stride, xa_stride,
                ALIGNED: tl.constexpr, RF: tl.constexpr, RT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Of each module, partial[chunk] [n_out, rank] = the sum over the chunk's tokens of dy^T xa_t, packed by the slot's own rank."""
    chunk, module = tl.program_id(0), tl.program_id(2)
    slot, start, stop = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1), tl.load(chunks + chunk * 3 + 2)
    first_column, n_out = _module(module, n_0, n_1, n_2)
    if (start < stop) & (tl.program_id(1) * N < n_out):
        places += module * n_slots * 8
        dy += first_column
        xa += module * (RF + RT)
        partial += tl.num_programs(0).to(tl.int64) * RT * first_column
        columns = tl.program_id(1) * N + tl.arange(0, N)
        ranks = tl.arange(0, RT)
        _, rank_t = _ranks(places, slot, ALIGNED)
        sums = tl.zeros((N, RT), dtype=tl.float32)
        for first in range(start, stop, M):
            rows = first + tl.arange(0, M)
            live = rows < stop
            inside = live[:, None] & (columns < n_out)[None, :]
            given = tl.load(dy + rows.to(tl.int64)[:, None] * dy_stride + columns[None, :], mask=inside, other=0.0)
            low = tl.load(
                xa + rows.to(tl.int64)[:, None] * xa_stride + RF + ranks[None, :], mask=live[:, None], other=0.0
            )
            sums = tl.dot(tl.trans(given), low, sums, input_precision="ieee")
        out = partial + chunk.to(tl.int64) * RT * n_out + columns.to(tl.int64)[:, None] * rank_t + ranks[None, :]
        tl.store(out, sums, mask=(columns < n_out)[:, None] & (ranks < rank_t)[None, :])


@triton.jit(do_not_specialize=["n_in", "n_0", "n_1", "n_2", "chunks_a", "chunks_b"])
def add_up(partial_a, partial_b, chunks_of_a, chunks_of_b, places, n_in, n_0, n_1, n_2, chunks_a, chunks_b,
           RT: tl.constexpr, N: tl.constexpr, MODULES: tl.constexpr):  # fmt: skip
    """Add to the gradients (fp32) of every slot's A, then B, of each module the sum of their chunks, first to last."""
    slot, module = tl.program_id(0), tl.program_id(2) % MODULES
    of_b = tl.program_id(2) >= MODULES
    places += module * tl.num_programs(0) * 8 + slot * 8
    before, width = _module(module, n_0, n_1, n_2)
    before, width = tl.where(of_b, before, module * n_in), tl.where(of_b, width, n_in)
    n_chunks = tl.where(of_b, chunks_b, chunks_a)
    partial = tl.where(of_b, partial_b, partial_a) + n_chunks.to(tl.int64) * RT * before
    chunks_of = tl.where(of_b, chunks_of_b, chunks_of_a) + slot * 2
    first, last = tl.load(chunks_of), tl.load(chunks_of + 1)
    rank_t, address = tl.load(places + 7), tl.load(places + tl.where(of_b, 5, 4))
    start = tl.program_id(1) * N
    if (rank_t > 0) & (address != 0) & (first < last) & (start < rank_t * width):
        elements = start + tl.arange(0, N)
        inside = elements < rank_t * width
        grad = address.to(tl.pointer_type(tl.float32)) + elements
        stride = width.to(tl.int64) * RT
        total = tl.zeros((N,), dtype=tl.float32)
        for chunk in range(first, last):
            total += tl.load(partial + chunk * stride + elements, mask=inside, other=0.0)
        tl.store(grad, tl.load(grad, mask=inside, other=0.0) + total, mask=inside)
