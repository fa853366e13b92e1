// Strom's threshold: words index << 1 | positive of what is beyond +-tau, and what remains owed.
#pragma once

// Of x, or of x + more, whose remainder goes to `out`. Each tile's words go to its own place in
// `room` and their number to counts[tile]; gather_words moves them together.
KERNEL strom_select(const float* x, const float* more, float* out, i64 n, float tau, int strict,
                    u32* room, i64* counts) {
    __shared__ u32 cells[CELLS + 1];
    const i64 tile = blockIdx.x;
    u32 sent = 0, positive = 0, place[ITEMS];
    for (int k = 0; k < ITEMS; k++) {
        const i64 i = item(tile, k);
        if (i >= n) break;
        const float v = value(x, more, i), size = fabsf(v);
        const bool goes = strict ? size > tau : size >= tau;
        sent |= u32(goes) << k;
        positive |= u32(v > 0) << k;
        if (out) out[i] = !goes ? v : v > 0 ? v + -tau : v + tau;
    }
    const u32 all = places(sent, place, cells);
    for (int k = 0; k < ITEMS; k++)
        if (sent >> k & 1)
            room[tile * TILE + place[k]] = u32(item(tile, k)) << 1 | (positive >> k & 1);
    if (threadIdx.x == 0) counts[tile] = all;
}
