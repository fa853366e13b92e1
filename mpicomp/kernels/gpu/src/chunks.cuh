// The largest of every block of up to 4096 neighbours: offsets of 12 bits, values of 2, 8, 32 bits.
//
// plan[tensors + 1][3]: how many elements, kept ones and blocks are before each tensor. A block of
// threads takes a block of elements; afterwards a thread takes kept elements of all tensors.
#pragma once

constexpr double MOST_COUNT = 2147483648.0;  // the largest magnitude, counted in whole numbers

struct Plan {
    const i64* rows;
    i64 tensors, block, k;

    __device__ i64 start(i64 t) const { return rows[3 * t]; }
    __device__ i64 kept(i64 t) const { return rows[3 * t + 1]; }
    __device__ i64 blocks(i64 t) const { return rows[3 * t + 2]; }
    __device__ i64 keeps(i64 t) const { return kept(t + 1) - kept(t); }

    // The tensor of number `i` in a column: 1 of what is kept, 2 of the blocks.
    __device__ i64 tensor(int column, i64 i) const {
        i64 t = 0, end = tensors;  // rows[t] <= i < rows[end]
        while (t + 1 < end) {
            const i64 middle = t + (end - t) / 2;
            if (rows[3 * middle + column] <= i) t = middle;
            else end = middle;
        }
        return t;
    }
};

// What is counted of each tensor while its levels are found.
struct Sums {
    u64 all, upper;  // whole numbers, of all and of those above the mean
    u64 above;       // how many these are
    u64 zeros;
};

// Where each of the kept elements lies.
struct Place {
    i64 tensor, begin, size, number;  // its block's first element and size, its number there

    __device__ Place(const Plan& plan, i64 i) : tensor(plan.tensor(1, i)) {
        const i64 own = i - plan.kept(tensor), stop = plan.start(tensor + 1);
        begin = plan.start(tensor) + own / plan.k * plan.block;
        size = stop - begin < plan.block ? stop - begin : plan.block;
        number = own % plan.k;
    }
};

// The offsets and values of what is kept of x, or of x + more, whose sum goes to `out`; and the
// largest magnitude of each tensor, as bits. One block of elements for each block of threads.
KERNEL chunks_select(const float* x, const float* more, float* out, const i64* rows, i64 tensors,
                     i64 block, i64 k, u32* offsets, float* values, u32* largest, u32* fault) {
    __shared__ u32 histogram[256], digit, equals;
    __shared__ i64 cells[WARPS], rest;
    __shared__ u32 of_sent[CELLS + 1], of_equal[CELLS + 1];
    const Plan plan{rows, tensors, block, k};
    const i64 t = plan.tensor(2, blockIdx.x), own = i64(blockIdx.x) - plan.blocks(t);
    const i64 begin = plan.start(t) + own * block, first = plan.kept(t) + own * k;
    const i64 left = plan.start(t + 1) - begin, unkept = plan.kept(t + 1) - first;
    const i64 n = left < block ? left : block, keep = unkept < k ? unkept : k;
    float v[ITEMS];
    for (int j = 0; j < ITEMS; j++) {
        const i64 at = item(0, j);
        if (at >= n) break;
        v[j] = value(x, more, begin + at);
        if (out) out[begin + at] = v[j];
    }
    u32 found = 0;
    i64 number = n - keep;  // of the least that is kept, in ascending order
    for (u32 shift = 32; shift;) {
        shift -= 8;
        histogram[threadIdx.x] = 0;
        __syncthreads();
        for (int j = 0; j < ITEMS && item(0, j) < n; j++) {
            const u32 bits = bits_of(v[j]) & 0x7FFFFFFFu;
            if (bits >> shift >> 8 == found >> shift >> 8)
                atomicAdd(&histogram[bits >> shift & 255], 1u);
        }
        __syncthreads();
        const u32 count = histogram[threadIdx.x];
        i64 all;
        const i64 before = scan<Sum>(i64(count), 0, cells, &all);
        if (before <= number && number < before + count) {
            digit = threadIdx.x;
            equals = count;
            rest = number - before;
        }
        __syncthreads();
        found |= digit << shift;
        number = rest;
    }
    u32 equal = 0, sent = 0, rank[ITEMS], place[ITEMS];
    for (int j = 0; j < ITEMS && item(0, j) < n; j++) {
        const u32 bits = bits_of(v[j]) & 0x7FFFFFFFu;
        equal |= u32(bits == found) << j;
        sent |= u32(bits > found) << j;
    }
    places(equal, rank, of_equal);
    for (int j = 0; j < ITEMS; j++)
        if (equal >> j & 1) sent |= u32(rank[j] < equals - number) << j;
    places(sent, place, of_sent);
    u32 most = 0;
    for (int j = 0; j < ITEMS; j++) {
        if (!(sent >> j & 1)) continue;
        offsets[first + place[j]] = u32(item(0, j));
        values[first + place[j]] = v[j];
        say(fault, !finite(v[j]));
        const u32 bits = bits_of(v[j]) & 0x7FFFFFFFu;
        if (bits > most) most = bits;
    }
    if (most) atomicMax(&largest[t], most);
}

// round(2^31 * |v| / largest)
__device__ inline u64 whole_of(float v, u32 largest) {
    const double most = float_of(largest);
    return u64(rint(double(fabsf(v)) * (largest ? MOST_COUNT / most : 0.0)));
}

__device__ inline bool is_above(u64 whole, i64 count, u64 sum) { return whole * u64(count) > sum; }

// Adds the numbers of a block of threads up: at once where all are of one tensor.
__device__ inline void add_up(u64* sum, i64 value, bool alone, i64* cells) {
    i64 all = value;
    if (!alone) {
        scan<Sum>(value, 0, cells, &all);
        if (threadIdx.x) return;
    }
    if (all) atomicAdd(sum, u64(all));
}

// Sums of the tensors' whole numbers: of all and of zeros or, if `upper`, of those above the mean.
KERNEL chunks_sums(const float* values, const i64* rows, i64 tensors, const u32* largest,
                   int upper, u64* sums) {
    __shared__ i64 cells[WARPS];
    const Plan plan{rows, tensors, 1, 1};
    const i64 kept = plan.kept(tensors), begin = i64(blockIdx.x) * THREADS, i = thread_number();
    const i64 end = begin + THREADS < kept ? begin + THREADS : kept;
    const i64 t = plan.tensor(1, i < kept ? i : kept - 1);
    const bool alone = plan.tensor(1, begin) != plan.tensor(1, end - 1);
    Sums* own = reinterpret_cast<Sums*>(sums) + t;
    const u64 whole = i < kept ? whole_of(values[i], largest[t]) : 0;
    if (upper) {
        const bool above = is_above(whole, plan.keeps(t), own->all);
        add_up(&own->upper, above ? i64(whole) : 0, alone, cells);
        add_up(&own->above, above, alone, cells);
    } else {
        add_up(&own->all, i64(whole), alone, cells);
        add_up(&own->zeros, i < kept && !whole, alone, cells);
    }
}

// The floats of 2 and of 8 bits: low and high, or step, of each tensor.
KERNEL chunks_scales(const i64* rows, i64 tensors, const u32* largest, const u64* sums, int bits,
                     float* scales) {
    const i64 t = thread_number();
    if (t >= tensors) return;
    const float most = float_of(largest[t]);
    if (bits == 8) {
        const float step = most / 127.0f, limit = float_of(0x7BFFFFFFu);
        scales[t] = step < limit ? step : limit;
        return;
    }
    const Sums sum = reinterpret_cast<const Sums*>(sums)[t];
    const double unit = double(most) * (1 / MOST_COUNT);
    const u64 below = u64(rows[3 * t + 4] - rows[3 * t + 1]) - sum.above;
    const double low = double(sum.all - sum.upper) / double(below ? below : 1) * unit;
    scales[2 * t] = sum.zeros ? 0.0f : float(low);
    scales[2 * t + 1] = float(double(sum.upper) / double(sum.above ? sum.above : 1) * unit);
}

// A thread packs four kept elements: six bytes of offsets, one or four of codes, or four floats;
// what is said of them is taken off `out`, unless that is null.
KERNEL chunks_pack(const u32* offsets, const float* values, const i64* rows, i64 tensors, i64 block,
                   i64 k, const u32* largest, const u64* sums, int bits, float* floats, u8* packed,
                   u8* codes, float* out) {
    const Plan plan{rows, tensors, block, k};
    const i64 kept = plan.kept(tensors), begin = 4 * thread_number();
    u64 triples = 0;
    u32 quad = 0;
    for (i64 i = begin; i < begin + 4 && i < kept; i++) {
        const Place at(plan, i);
        const float v = values[i];
        float said = v;
        triples |= u64(offsets[i]) << 12 * (i - begin);
        if (bits == 32) {
            floats[i] = v;
        } else if (bits == 8) {
            const float step = floats[at.tensor], code = step ? rintf(v / step) : 0.0f;
            const int whole = code > 127 ? 127 : code < -127 ? -127 : int(code);
            codes[i] = u8(whole);
            said = float(whole) * step;
        } else {
            const u64 whole = whole_of(v, largest[at.tensor]);
            const u64 sum = reinterpret_cast<const Sums*>(sums)[at.tensor].all;
            const u32 above = is_above(whole, plan.keeps(at.tensor), sum), positive = v > 0;
            const float size = floats[2 * at.tensor + above];
            quad |= (above << 1 | positive) << 2 * (i - begin);
            said = positive ? size : -size;
        }
        if (out) out[at.begin + offsets[i]] += -1.0f * said;
    }
    const i64 bytes = ceil_div(3 * kept, 2);
    for (i64 b = begin / 4 * 6; b < begin / 4 * 6 + 6 && b < bytes; b++, triples >>= 8)
        packed[b] = u8(triples);
    if (bits == 2 && begin < kept) codes[begin / 4] = u8(quad);
}

__device__ inline i64 offset_of(const u8* packed, i64 i) {
    const u8* at = packed + i / 2 * 3;
    return i % 2 ? at[1] >> 4 | at[2] << 4 : at[0] | (at[1] & 15) << 8;
}

// out += weight * what is said of each kept element; a thread takes one.
KERNEL chunks_add(const float* floats, const u8* packed, const u8* codes, const i64* rows,
                  i64 tensors, i64 block, i64 k, int bits, float weight, float* out, u32* fault) {
    const Plan plan{rows, tensors, block, k};
    const i64 i = thread_number();
    if (i >= plan.kept(tensors)) return;
    const Place at(plan, i);
    const i64 offset = offset_of(packed, i), before = at.number ? offset_of(packed, i - 1) : -1;
    float said;
    bool fits = in_order(before, offset, at.size);
    if (bits == 32) {
        said = floats[i];
        fits = fits && finite(said);
    } else if (bits == 8) {
        const float step = floats[at.tensor];
        const int code = reinterpret_cast<const s8*>(codes)[i];
        said = float(code) * step;
        fits = fits && code != -128 && step >= 0 && step <= float_of(0x7BFFFFFFu);
    } else {
        const u32 code = codes[i / 4] >> 2 * (i % 4) & 3;
        const float low = floats[2 * at.tensor], high = floats[2 * at.tensor + 1];
        const float size = code >> 1 ? high : low;
        said = code & 1 ? size : -size;
        fits = fits && low >= 0 && finite(low) && high >= 0 && finite(high);
    }
    say(fault, !fits);
    if (fits) out[at.begin + offset] += weight * said;
}
