// AdaComp: in each bin the elements that grew to its maximum, as entries of 8 or 16 bits.
#pragma once

// g is what is owed with the newest gradient; h = ahead * grad + g, where ahead = factor - 1.
__device__ inline bool adacomp_sent(float g, float grad, float ahead, float most) {
    return fabsf(ahead * grad + g) >= most && most > 0 && g != 0;
}

// A warp takes a bin of g = x or, kept in `out`, x + more: its largest |g|, how many are sent.
KERNEL adacomp_bins(const float* x, const float* more, float* out, const float* grad, float ahead,
                    i64 n, i64 size, float* largest, i64* counts) {
    const i64 bin = thread_number() / 32, begin = bin * size;
    if (begin >= n) return;  // a whole warp
    const i64 end = begin + size < n ? begin + size : n;
    u32 most = 0;
    for (i64 i = begin + lane(); i < end; i += 32) {
        const float g = value(x, more, i);
        if (out) out[i] = g;
        const u32 bits = bits_of(g) & 0x7FFFFFFFu;
        if (bits > most) most = bits;
    }
    for (int reach = 16; reach; reach /= 2) {
        const u32 other = __shfl_xor_sync(FULL, most, reach);
        if (other > most) most = other;
    }
    u32 count = 0;
    for (i64 i = begin + lane(); i < end; i += 32)
        count += adacomp_sent(out ? out[i] : x[i], grad[i], ahead, float_of(most));
    for (int reach = 16; reach; reach /= 2) count += __shfl_xor_sync(FULL, count, reach);
    if (lane() == 0) largest[bin] = float_of(most), counts[bin] = count;
}

// A layer's place in the packet: scale, the mean of the bins' largest from the folded lanes, and
// the number of its entries. They begin ends[0] bytes behind the head, the next layer's at ends[1].
// A layer without bins has neither lanes nor total. One thread works.
KERNEL adacomp_head(const float* lanes, i64 bins, const i64* total, int width, i64* ends,
                    float* scale, u32* count, u32* fault) {
    if (thread_number() > 0) return;
    float sum = 0;
    for (int lane = 0; bins && lane < 32; lane++) sum += lanes[lane];
    const i64 entries = bins ? *total : 0;
    *scale = bins ? sum / float(bins) : 0;
    *count = u32(entries);
    ends[1] = ends[0] + width * entries;
    say(fault, !finite(*scale));
}

// The last bin of each block's 256 that sends anything, or -1.
KERNEL adacomp_last(const i64* counts, i64 bins, i64* last) {
    __shared__ i64 cells[WARPS];
    const i64 bin = thread_number();
    i64 all;
    scan<Largest>(bin < bins && counts[bin] ? bin : -1, -1, cells, &all);
    if (threadIdx.x == 0) last[blockIdx.x] = all;
}

// For each bin: the bin that sent before it (previous), and where its entries begin within those of
// the block's 256 bins (place); of each block how many entries it has. last[] was scanned.
KERNEL adacomp_places(const i64* counts, i64 bins, i64 most, const i64* last, i64* previous,
                      i64* place, i64* entries) {
    __shared__ i64 cells[WARPS];
    const i64 bin = thread_number(), count = bin < bins ? counts[bin] : 0;
    i64 all;
    const i64 within = scan<Largest>(count ? bin : -1, -1, cells, &all);
    const i64 before = Largest::of(last[blockIdx.x], within);
    const i64 own = count ? count + ceil_div(bin - before - 1, most) : 0;
    const i64 begin = scan<Sum>(own, 0, cells, &all);
    if (bin < bins) previous[bin] = before, place[bin] = begin;
    if (threadIdx.x == 0) entries[blockIdx.x] = all;
}

__device__ inline void put_entry(u8* data, int width, i64 k, i64 field, bool last, bool positive) {
    const u32 entry = u32(field) << 2 | u32(last) << 1 | u32(positive);
    if (width == 1) data[k] = u8(entry);
    else reinterpret_cast<u16*>(data)[k] = u16(entry);
}

// A warp writes the entries of its bin: first the runs of empty bins before it, then its elements.
// In `out`, if there is, stands g; what was sent is taken off. entries[] was scanned. The layer's
// entries begin *start bytes into `packet`.
KERNEL adacomp_write(const float* x, float* out, const float* grad, float ahead, i64 n, i64 size,
                     const float* largest, const i64* counts, i64 most, const i64* previous,
                     const i64* place, const i64* entries, const float* scale, int width,
                     const i64* start, u8* packet) {
    const i64 bin = thread_number() / 32, begin = bin * size;
    if (begin >= n || !counts[bin]) return;  // a whole warp
    const i64 end = begin + size < n ? begin + size : n;
    u8* data = packet + *start;
    i64 at = entries[bin / THREADS] + place[bin], sent = 0;
    const i64 empty = bin - previous[bin] - 1, runs = ceil_div(empty, most);
    for (i64 r = lane(); r < runs; r += 32) {
        const i64 length = r < runs - 1 ? most : empty - r * most;
        put_entry(data, width, at + r, size - 2 + length, false, false);
    }
    at += runs;
    for (i64 first = begin; first < end; first += 32) {
        const i64 i = first + lane();
        float g = 0;
        bool goes = false;
        if (i < end) {
            g = out ? out[i] : x[i];
            goes = adacomp_sent(g, grad[i], ahead, largest[bin]);
        }
        const u32 warps = __ballot_sync(FULL, goes);
        const i64 number = sent + __popc(warps & ((1u << lane()) - 1));
        if (goes) {
            put_entry(data, width, at + number, i - begin, number == counts[bin] - 1, g > 0);
            if (out) out[i] = g > 0 ? g + -*scale : g + *scale;
        }
        sent += __popc(warps);
    }
}

// ---- decoding -----------------------------------------------------------------------------------

struct Entry {
    i64 field;
    bool last, positive, skip;

    __device__ Entry(const u8* data, int width, i64 size, i64 k) {
        const u32 entry = width == 1 ? data[k] : reinterpret_cast<const u16*>(data)[k];
        field = entry >> 2, last = entry >> 1 & 1, positive = entry & 1;
        skip = !last && field >= size - 1;
    }

    // How many bins lie between this entry's and the next one's.
    __device__ i64 step(i64 size) const { return skip ? field - size + 2 : i64(last); }
};

// How far each block's 256 entries go on, in bins.
KERNEL adacomp_steps(const u8* data, int width, i64 count, i64 size, i64* steps) {
    __shared__ i64 cells[WARPS];
    const i64 k = thread_number();
    i64 all;
    scan<Sum>(k < count ? Entry(data, width, size, k).step(size) : 0, 0, cells, &all);
    if (threadIdx.x == 0) steps[blockIdx.x] = all;
}

// out += +-quantum at the elements that the entries name; steps[] was scanned.
KERNEL adacomp_add(const u8* data, int width, i64 count, i64 size, const i64* steps, float quantum,
                   float* out, i64 n, u32* fault) {
    __shared__ i64 cells[WARPS];
    const i64 k = thread_number();
    const Entry entry(data, width, size, k < count ? k : count - 1);
    i64 all;
    const i64 bin = steps[blockIdx.x] + scan<Sum>(k < count ? entry.step(size) : 0, 0, cells, &all);
    if (k >= count) return;
    bool fits = entry.skip ? !entry.positive : entry.field < size;
    if (k == count - 1) fits = fits && entry.last;
    if (k && !entry.skip) {  // elements of one bin ascend; after a run of bins they must
        const Entry before(data, width, size, k - 1);
        if (!before.skip && !before.last) fits = fits && entry.field > before.field;
    }
    const i64 index = bin * size + entry.field;
    if (!entry.skip) fits = fits && index < n;
    say(fault, !fits);
    if (fits && !entry.skip) out[index] += entry.positive ? quantum : -quantum;
}
