// Ordered compaction and prefix sums: count in tiles, scan the counts, write in order.
#pragma once

constexpr int ITEMS = 16;              // of a thread
constexpr int TILE = ITEMS * THREADS;  // elements that one block selects from
constexpr int CELLS = ITEMS * WARPS;   // counts in a tile: one for each warp and item

// Item k of thread t is element k * THREADS + t of the tile, so neighbours read neighbours.
__device__ inline i64 item(i64 tile, int k) { return tile * TILE + k * THREADS + threadIdx.x; }

// For each item whose bit in `sent` is set: how many of the tile's elements before it are sent.
// Returns how many are sent in all. cells[CELLS + 1] is shared memory; used once in a block.
__device__ inline u32 places(u32 sent, u32* place, u32* cells) {
    const u32 below = (1u << lane()) - 1;
    for (int k = 0; k < ITEMS; k++) {
        const u32 warps = __ballot_sync(FULL, sent >> k & 1);
        place[k] = __popc(warps & below);
        if (lane() == 0) cells[k * WARPS + warp()] = __popc(warps);
    }
    __syncthreads();
    if (warp() == 0) {
        constexpr int EACH = CELLS / 32;
        u32 own = 0;
        for (int c = 0; c < EACH; c++) own += cells[lane() * EACH + c];
        u32 sum = own;
        for (u32 reach = 1; reach < 32; reach *= 2) {
            const u32 left = __shfl_up_sync(FULL, sum, reach);
            if (lane() >= reach) sum += left;
        }
        u32 before = sum - own;
        for (int c = 0; c < EACH; c++) {
            const u32 count = cells[lane() * EACH + c];
            cells[lane() * EACH + c] = before;
            before += count;
        }
        if (lane() == 31) cells[CELLS] = sum;
    }
    __syncthreads();
    for (int k = 0; k < ITEMS; k++) place[k] += cells[k * WARPS + warp()];
    return cells[CELLS];
}

struct Sum {
    __device__ static i64 of(i64 a, i64 b) { return a + b; }
};

struct Largest {  // of numbers from -1 on
    __device__ static i64 of(i64 a, i64 b) { return a > b ? a : b; }
};

// What Op makes of the values of all threads before this one, `none` for the first; *all becomes
// what it makes of those of the whole block. cells[WARPS] is shared memory.
template <class Op> __device__ i64 scan(i64 value, i64 none, i64* cells, i64* all) {
    i64 upto = value;
    for (u32 reach = 1; reach < 32; reach *= 2) {
        const i64 left = __shfl_up_sync(FULL, upto, reach);
        if (lane() >= reach) upto = Op::of(left, upto);
    }
    const i64 left = __shfl_up_sync(FULL, upto, 1);
    __syncthreads();  // who still reads cells of the scan before?
    if (lane() == 31) cells[warp()] = upto;
    __syncthreads();
    i64 before = none;
    *all = none;
    for (u32 w = 0; w < WARPS; w++) {
        if (w == warp()) before = *all;
        *all = Op::of(*all, cells[w]);
    }
    return lane() ? Op::of(before, left) : before;
}

// numbers[i] becomes what Op makes of all before it, *all what it makes of all. One block.
template <class Op>
__device__ void scan_all(i64* numbers, i64 count, i64 none, i64* cells, i64* all) {
    constexpr int EACH = 8;
    i64 carry = none;
    for (i64 at = 0; at < count; at += EACH * THREADS) {
        const i64 begin = at + EACH * threadIdx.x;
        i64 own = none, block;
        for (i64 i = begin; i < begin + EACH && i < count; i++) own = Op::of(own, numbers[i]);
        i64 before = Op::of(carry, scan<Op>(own, none, cells, &block));
        for (i64 i = begin; i < begin + EACH && i < count; i++) {
            const i64 number = numbers[i];
            numbers[i] = before;
            before = Op::of(before, number);
        }
        carry = Op::of(carry, block);
    }
    if (threadIdx.x == 0) *all = carry;
}

KERNEL scan_sums(i64* numbers, i64 count, i64* all) {
    __shared__ i64 cells[WARPS];
    scan_all<Sum>(numbers, count, 0, cells, all);
}

KERNEL scan_largest(i64* numbers, i64 count, i64* all) {
    __shared__ i64 cells[WARPS];
    scan_all<Largest>(numbers, count, -1, cells, all);
}

// The words that each tile left at the beginning of its own place in `room`, moved together. A
// block moves those of one tile; before[] and *all are what scan_sums made of the tiles' counts.
__device__ inline void move_words(const u32* room, const i64* before, i64 tiles, const i64* all,
                                  u32* data) {
    const i64 tile = blockIdx.x, at = before[tile];
    const i64 count = (tile + 1 < tiles ? before[tile + 1] : *all) - at;
    for (i64 j = threadIdx.x; j < count; j += THREADS) data[at + j] = room[tile * TILE + j];
}

KERNEL gather_words(const u32* room, const i64* before, i64 tiles, const i64* all, u32* data) {
    move_words(room, before, tiles, all, data);
}
