// Gradient dropping: indices, then values, of what is larger than the cut.
#pragma once

// Of one scope of x, or of x + more, whose remainder goes to `out` (0 where a value was sent). The
// scope's tiles are first_tile, first_tile + 1 ...; indices, and values unless that is null, go to
// each tile's own place, and their number to counts[tile].
KERNEL dropping_select(const float* x, const float* more, float* out, i64 n, const float* cut,
                       i64 start, i64 first_tile, u32* room, float* values, i64* counts,
                       u32* fault) {
    __shared__ u32 cells[CELLS + 1];
    const i64 own = blockIdx.x, at = (first_tile + own) * TILE;
    u32 sent = 0, place[ITEMS];
    float v[ITEMS];
    for (int k = 0; k < ITEMS; k++) {
        const i64 i = item(own, k);
        if (i >= n) break;
        v[k] = value(x, more, i);
        const bool goes = fabsf(v[k]) > *cut;
        sent |= u32(goes) << k;
        if (out) {
            out[i] = goes ? 0.0f : v[k];
            say(fault, goes && !finite(v[k]));
        }
    }
    const u32 all = places(sent, place, cells);
    for (int k = 0; k < ITEMS; k++)
        if (sent >> k & 1) {
            room[at + place[k]] = u32(start + item(own, k));
            if (values) values[at + place[k]] = v[k];
        }
    if (threadIdx.x == 0) counts[first_tile + own] = all;
}

// Indices to the front of data and values behind the last of them, tile by tile as gather_words.
KERNEL gather_pairs(const u32* room, const float* values, const i64* before, i64 tiles,
                    const i64* all, u32* data) {
    const i64 tile = blockIdx.x, at = before[tile], total = *all;
    const i64 count = (tile + 1 < tiles ? before[tile + 1] : total) - at;
    for (i64 j = threadIdx.x; j < count; j += THREADS) {
        data[at + j] = room[tile * TILE + j];
        data[total + at + j] = bits_of(values[tile * TILE + j]);
    }
}

// x[index] behind the `count` indices at the front of data.
KERNEL dropping_values(const float* x, i64 count, u32* data) {
    const i64 k = thread_number();
    if (k < count) data[count + k] = bits_of(x[data[k]]);
}

// Of one scope of x: words index << 1 | positive of what is larger than the cut, as dropping_select
// leaves indices, and in the same way the values that are negative and the others, whose numbers go
// to below[tile] and above[tile].
KERNEL dropping_signs(const float* x, i64 n, const float* cut, i64 start, u32* room, float* lower,
                      float* upper, i64* counts, i64* below, i64* above) {
    __shared__ u32 cells[CELLS + 1];
    __shared__ u32 others[CELLS + 1];
    const i64 own = blockIdx.x, at = own * TILE;
    u32 sent = 0, negative = 0, place[ITEMS], under[ITEMS];
    float v[ITEMS];
    for (int k = 0; k < ITEMS; k++) {
        const i64 i = item(own, k);
        if (i >= n) break;
        v[k] = x[i];
        const bool goes = fabsf(v[k]) > *cut;
        sent |= u32(goes) << k;
        negative |= u32(goes && v[k] < 0) << k;
    }
    const u32 all = places(sent, place, cells), negatives = places(negative, under, others);
    for (int k = 0; k < ITEMS; k++) {
        if (!(sent >> k & 1)) continue;
        const bool positive = !(negative >> k & 1);
        room[at + place[k]] = u32(start + item(own, k)) << 1 | u32(positive);
        if (positive) upper[at + place[k] - under[k]] = v[k];
        else lower[at + under[k]] = v[k];
    }
    if (threadIdx.x) return;
    counts[own] = all;
    below[own] = negatives;
    above[own] = all - negatives;
}

// means[2] = sum / count of the negative and of the positive ones; 0 where there are none.
KERNEL dropping_means(const float* lower, const i64* below, const float* upper, const i64* above,
                      float* means) {
    const i64 side = thread_number();
    if (side > 1) return;
    const i64 count = side ? *above : *below;
    means[side] = (side ? *upper : *lower) / float(count ? count : 1);
}
