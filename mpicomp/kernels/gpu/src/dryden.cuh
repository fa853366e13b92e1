// Dryden (version 2016): two thresholds a column, words of what passed them, two means a column.
#pragma once

constexpr int KEPT = 1024;  // values of a column that fit into shared memory

// Bits that are ordered as the floats are, both zeros alike.
__device__ inline u32 ordered(float x) {
    const u32 bits = x == 0 ? 0 : bits_of(x);
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

__device__ inline float unordered(u32 key) {
    return float_of(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

// The values of one column, or `sample` draws from it; a block works on them.
struct Column {
    const float *x, *more;
    i64 rows, columns, column, sample;
    Key key;
    i64 start;
    const float* kept;  // all values, or null where they are too many

    __device__ i64 count() const { return sample ? sample : rows; }

    __device__ float at(i64 k) const {
        if (kept) return kept[k];
        i64 row = k;
        if (sample) {
            Draws draws(key);
            row = i64(u64(draws.word(u64(start + column * sample + k))) * u64(rows) >> 32);
        }
        return value(x, more, row * columns + column);
    }
};

// Number `number` of a column's values in ascending order, for all threads of the block.
__device__ inline float select_in(const Column& c, i64 number, u32* histogram, i64* cells,
                                  i64* state) {
    if (threadIdx.x == 0) state[0] = 0, state[1] = number;
    for (int shift = 24; shift >= 0; shift -= 8) {
        histogram[threadIdx.x] = 0;
        __syncthreads();
        const u64 found = u64(state[0]) >> shift >> 8;
        for (i64 k = threadIdx.x; k < c.count(); k += THREADS) {
            const u64 bits = ordered(c.at(k));
            if (bits >> shift >> 8 == found) atomicAdd(&histogram[bits >> shift & 255], 1u);
        }
        __syncthreads();
        const i64 own = histogram[threadIdx.x], wanted = state[1];
        i64 all;
        const i64 before = scan<Sum>(own, 0, cells, &all);  // its barriers: all have read state
        if (before <= wanted && wanted < before + own) {
            state[0] |= i64(threadIdx.x) << shift;
            state[1] = wanted - before;
        }
        __syncthreads();
    }
    const float result = unordered(u32(state[0]));
    __syncthreads();
    return result;
}

// lower[columns] and upper[columns], a block for each column.
KERNEL dryden_columns(const float* x, const float* more, i64 rows, i64 columns, i64 proportion,
                      i64 sample, u32 bucket, u32 step, u32 rank, u32 key0, u32 key1, i64 start,
                      float* lower, float* upper) {
    __shared__ u32 histogram[256];
    __shared__ i64 cells[WARPS], state[2];
    __shared__ float kept[KEPT];
    Column c{x, more, rows, columns, blockIdx.x, sample, Key{bucket, step, rank, key0, key1}, start,
             nullptr};
    if (c.count() <= KEPT) {
        for (i64 k = threadIdx.x; k < c.count(); k += THREADS) kept[k] = c.at(k);
        c.kept = kept;
        __syncthreads();
    }
    i64 negative = 0, own = 0;
    for (i64 k = threadIdx.x; k < c.count(); k += THREADS) own += c.at(k) < 0;
    scan<Sum>(own, 0, cells, &negative);
    const i64 positive = c.count() - negative;
    const float infinity = float_of(0x7F800000u);
    float low = -infinity, up = infinity;
    if (negative) {
        const i64 keep = negative / proportion;
        low = select_in(c, (keep ? keep : 1) - 1, histogram, cells, state);
    }
    if (positive) {
        const i64 keep = positive / proportion;
        up = select_in(c, c.count() - (keep ? keep : 1), histogram, cells, state);
    }
    if (threadIdx.x == 0) lower[blockIdx.x] = low, upper[blockIdx.x] = up;
}

// Is v sent, given its column's thresholds? A zero never is.
__device__ inline bool dryden_sent(float v, float lower, float upper) {
    return (v <= lower && v < 0) || (v >= upper && v > 0);
}

// A thread takes 32 rows of one column: the first level of the folds of what is sent of either
// sign, sums[2][blocks][columns], and how many these are, counts alike.
KERNEL dryden_sums(const float* x, const float* more, i64 rows, i64 columns, const float* lower,
                   const float* upper, float* sums, u32* counts) {
    const i64 blocks = ceil_div(rows, 32), t = thread_number();
    if (t >= blocks * columns) return;
    const i64 first = t / columns * 32, column = t % columns;
    float below = 0, above = 0;
    u32 belows = 0, aboves = 0;
    for (i64 row = first; row < first + 32 && row < rows; row++) {
        const float v = value(x, more, row * columns + column);
        if (!dryden_sent(v, lower[column], upper[column])) continue;
        if (v < 0) below += v, belows++;
        else above += v, aboves++;
    }
    sums[t] = below;
    sums[blocks * columns + t] = above;
    counts[t] = belows;
    counts[blocks * columns + t] = aboves;
}

// means[2][columns] from the folded sums and counts.
KERNEL dryden_means(const float* sums, const u32* counts, i64 columns, float* means, u32* fault) {
    const i64 t = thread_number();
    if (t >= 2 * columns) return;
    means[t] = sums[t] / float(counts[t] ? counts[t] : 1u);
    say(fault, !finite(means[t]));
}

// Words index << 1 | positive of x, or of x + more, whose remainder goes to `out`; as strom_select.
KERNEL dryden_select(const float* x, const float* more, float* out, i64 n, i64 columns,
                     const float* lower, const float* upper, const float* means, u32* room,
                     i64* counts) {
    __shared__ u32 cells[CELLS + 1];
    const i64 tile = blockIdx.x;
    u32 sent = 0, positive = 0, place[ITEMS];
    for (int k = 0; k < ITEMS; k++) {
        const i64 i = item(tile, k);
        if (i >= n) break;
        const i64 column = columns == 1 ? 0 : i % columns;
        const float v = value(x, more, i);
        const bool goes = dryden_sent(v, lower[column], upper[column]);
        sent |= u32(goes) << k;
        positive |= u32(v > 0) << k;
        if (out) out[i] = goes ? v + -means[(v > 0 ? columns : 0) + column] : v;
    }
    const u32 all = places(sent, place, cells);
    for (int k = 0; k < ITEMS; k++)
        if (sent >> k & 1)
            room[tile * TILE + place[k]] = u32(item(tile, k)) << 1 | (positive >> k & 1);
    if (threadIdx.x == 0) counts[tile] = all;
}

// One matrix in the packet, from word place[0] on: how many words, means[2 * columns], and the
// words that each tile left in `room`, as gather_words moves them. place[1]: where the next begins.
KERNEL dryden_put(const u32* room, const i64* before, i64 tiles, const i64* all, const float* means,
                  i64 columns, i64* place, u32* data) {
    const i64 head = place[0] + 1, first = head + 2 * columns;
    for (i64 j = thread_number(); j < 2 * columns; j += tiles * THREADS)
        data[head + j] = bits_of(means[j]);
    move_words(room, before, tiles, all, data + first);
    if (thread_number() == 0) {
        data[head - 1] = u32(*all);
        place[1] = first + *all;
    }
}

// Where each matrix begins in each packet of words[packets] words: places[packets][matrices + 1];
// -1 from where a packet is too short.
KERNEL dryden_walk(const u64* payloads, const i64* words, i64 packets, const i64* columns,
                   i64 matrices, i64* places) {
    const i64 p = thread_number();
    if (p >= packets) return;
    const u32* data = reinterpret_cast<const u32*>(payloads[p]);
    i64 at = 0, *place = places + p * (matrices + 1);
    for (i64 t = 0; t < matrices; t++) {
        place[t] = at;
        if (at < 0) continue;
        const i64 first = at + 1 + 2 * columns[t];
        at = first > words[p] ? -1 : first + data[at];
        if (at > words[p]) at = -1;
    }
    place[matrices] = at;
}
