// One element of every run, drawn at random. A thread takes four runs: one Philox block.
#pragma once

// Run j of `keep` runs of n elements: its length, and the element that is drawn from it.
struct RunOf {
    i64 element, length;

    __device__ RunOf(i64 j, i64 n, i64 keep, Draws& draws) {
        const i64 begin = j * n / keep;
        length = (j + 1) * n / keep - begin;
        element = begin + i64(u64(draws.word(u64(j))) * u64(length) >> 32);
    }
};

KERNEL randomk_encode(const float* x, i64 n, i64 keep, int scale, u32 bucket, u32 step, u32 rank,
                      u32 key0, u32 key1, float* data) {
    Draws draws(Key{bucket, step, rank, key0, key1});
    const i64 begin = 4 * thread_number();
    for (i64 j = begin; j < begin + 4 && j < keep; j++) {
        const RunOf run(j, n, keep, draws);
        data[j] = scale ? x[run.element] * float(run.length) : x[run.element];
    }
}

KERNEL randomk_add(const float* data, i64 keep, u32 bucket, u32 step, u32 rank, u32 key0, u32 key1,
                   float weight, float* out, i64 n, u32* fault) {
    Draws draws(Key{bucket, step, rank, key0, key1});
    const i64 begin = 4 * thread_number();
    for (i64 j = begin; j < begin + 4 && j < keep; j++) {
        say(fault, !finite(data[j]));
        if (finite(data[j])) out[RunOf(j, n, keep, draws).element] += weight * data[j];
    }
}
