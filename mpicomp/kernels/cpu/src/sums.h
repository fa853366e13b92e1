// Sums in the one order that all backends follow, and small things.
#pragma once

#include "common.h"

namespace {

// Are all of these finite? The sum has the top bit where the exponent is all ones. Unless `to` is
// null, they are copied there.
bool copy_finite_plain(const float* x, float* to, i64 n) {
    u32 seen = 0;
    for (i64 i = 0; i < n; i++) {
        seen |= (bits_of(x[i]) & 0x7F800000u) + 0x00800000u;
        if (to) to[i] = x[i];
    }
    return !(seen >> 31);
}

#if HAVE_AVX2
template <bool COPY> AVX2 bool copy_finite_avx2(const float* x, float* to, i64 n, bool stream) {
    const __m256i exponent = _mm256_set1_epi32(0x7F800000), one = _mm256_set1_epi32(0x00800000);
    __m256i seen[4] = {};
    i64 i = stream ? until_aligned(to, n) : 0;
    bool fine = copy_finite_plain(x, to, i);
    for (; i + 32 <= n; i += 32) {
        next_page(x + i);
        for (int k = 0; k < 4; k++) {
            const __m256 v = _mm256_loadu_ps(x + i + 8 * k);
            const __m256i bits = _mm256_and_si256(_mm256_castps_si256(v), exponent);
            seen[k] = _mm256_or_si256(seen[k], _mm256_add_epi32(bits, one));
            if (COPY) store(to + i + 8 * k, v, stream);
        }
    }
    if (stream) _mm_sfence();
    const __m256i any = _mm256_or_si256(_mm256_or_si256(seen[0], seen[1]),
                                        _mm256_or_si256(seen[2], seen[3]));
    fine &= !_mm256_movemask_ps(_mm256_castsi256_ps(any));
    return copy_finite_plain(x + i, COPY ? to + i : nullptr, n - i) && fine;
}
#endif

bool finite(const float* x, i64 n) {
#if HAVE_AVX2
    if (avx2) return copy_finite_avx2<false>(x, nullptr, n, false);
#endif
    return copy_finite_plain(x, nullptr, n);
}

// Copies x and says whether all of it is finite.
bool copy_finite(const float* x, float* to, i64 n, bool stream) {
#if HAVE_AVX2
    if (avx2) return copy_finite_avx2<true>(x, to, n, stream);
#endif
    return copy_finite_plain(x, to, n);
}

bool finite_bytes(const u8* data, i64 n) {
    u32 seen = 0;
    for (i64 i = 0; i < n; i++) seen |= (get<u32>(data + 4 * i) & 0x7F800000u) + 0x00800000u;
    return !(seen >> 31);
}

// The largest of n magnitudes.
float magnitude_plain(const float* x, i64 n, float most) {
    for (i64 i = 0; i < n; i++) most = std::max(most, std::fabs(x[i]));
    return most;
}

#if HAVE_AVX2
AVX2 float magnitude_avx2(const float* x, i64 n) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    __m256 most[4] = {};
    i64 i = 0;
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < 4; k++)
            most[k] = _mm256_max_ps(most[k], _mm256_and_ps(mask, _mm256_loadu_ps(x + i + 8 * k)));
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_max_ps(_mm256_max_ps(most[0], most[1]),
                                         _mm256_max_ps(most[2], most[3])));
    return magnitude_plain(x + i, n - i, *std::max_element(lanes, lanes + 8));
}
#endif

float magnitude(const float* x, i64 n) {
#if HAVE_AVX2
    if (avx2) return magnitude_avx2(x, n);
#endif
    return magnitude_plain(x, n, 0.0f);
}

// `fold` of the reference for rows of `width` numbers, fed with the sums of its blocks of 32 rows.
// Level k is the running sum of up to 32 finished sums of level k - 1. (0 + s = s for every sum s:
// they begin with +0, so none is -0, and one level more than the reference has changes nothing.)
template <class T> class Fold {
  public:
    static constexpr int LEVELS = 7;  // 32 * 32**7 rows

    Fold(T* memory, i64 width) : sums_(memory), width_(width) {  // LEVELS * width numbers
        std::fill(sums_, sums_ + LEVELS * width, T(0));
    }

    void add(const T* block) {
        add_at(0, block);
        for (int level = 0; count_[level] == 32; level++) carry(level);
    }

    const T* result() {
        for (int level = 0; level < LEVELS - 1; level++)
            if (count_[level]) carry(level);
        return sums_ + (LEVELS - 1) * width_;
    }

  private:
    void add_at(int level, const T* block) {
        T* sum = sums_ + level * width_;
        for (i64 i = 0; i < width_; i++) sum[i] += block[i];
        count_[level]++;
    }

    void carry(int level) {
        T* sum = sums_ + level * width_;
        add_at(level + 1, sum);
        std::fill(sum, sum + width_, T(0));
        count_[level] = 0;
    }

    T* sums_;
    i64 width_;
    int count_[LEVELS] = {};
};

// `total` of the reference: 32 lanes (element i is in lane i % 32), each folded, then folded.
float total(const float* v, i64 n) {
    float memory[32 * Fold<float>::LEVELS], block[32], sum = 0;
    Fold<float> fold(memory, 32);
    for (i64 at = 0; at < n; at += 1024) {
        std::fill(block, block + 32, 0.0f);
        for (i64 i = at; i < std::min(n, at + 1024); i++) block[i % 32] += v[i];
        fold.add(block);
    }
    const float* lanes = fold.result();
    for (int lane = 0; lane < 32; lane++) sum += lanes[lane];
    return sum;
}

}  // namespace

API int mp_finite(const float* x, i64 n) {
    std::atomic<bool> fine{true};
    split(n, 1, grain, [&](int, i64 begin, i64 end) {
        for (i64 at = begin; at < end && fine; at += 1 << 16)
            if (!finite(x + at, std::min<i64>(1 << 16, end - at))) fine = false;
    });
    return fine;
}

// to = x; are all of them finite?
API int mp_copy_finite(const float* x, float* to, i64 n) {
    std::atomic<bool> fine{true};
    split(n, 16, grain, [&](int, i64 begin, i64 end) {
        if (!copy_finite(x + begin, to + begin, end - begin, n >= stream_from)) fine = false;
    });
    return fine;
}

API int mp_finite_bytes(const u8* data, i64 n) { return finite_bytes(data, n); }

// ahead = history + x * x; x /= sqrt(ahead) + 1e-8.
API void mp_adagrad(float* x, i64 n, const float* history, float* ahead) {
    split(n, 16, grain, [&](int, i64 begin, i64 end) {
        for (i64 i = begin; i < end; i++) {
            ahead[i] = history[i] + x[i] * x[i];
            x[i] = x[i] / (std::sqrt(ahead[i]) + 1e-8f);
        }
    });
}
