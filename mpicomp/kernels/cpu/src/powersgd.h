// Products of a matrix with few columns, and their orthonormalisation, in one fixed order.
#pragma once

#include "philox.h"
#include "sums.h"

namespace {

// One tensor of a bucket; rank 0: it is sent as it is. Factors lie column by column.
struct Part {
    i64 start, rows, columns, rank;
    i64 size() const { return rows * columns; }
    i64 rest() const { return rank ? rank * columns : size(); }
};

constexpr int LANES = 32;
constexpr i64 TILE = 1024;  // columns whose running sums stay in the cache
constexpr float MOST_FACTOR = 0x1p122f;
constexpr double LEAST_NORM = 1e-9;

#define INLINE inline __attribute__((always_inline))

// `powersgd_dot` of the reference: 32 lanes, then halves.
template <class T> INLINE T dot_lanes(const T* a, const T* b, i64 n) {
    alignas(64) T lanes[LANES] = {};
    i64 at = 0;
    for (; at + LANES <= n; at += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += a[at + l] * b[at + l];
    for (i64 i = at; i < n; i++) lanes[i - at] += a[i] * b[i];
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

// product = M Q, rows begin ... end - 1.
INLINE void project_rows(const float* x, const Part& p, const float* q, float* product, i64 begin,
                         i64 end) {
    for (i64 i = begin; i < end; i++)
        for (i64 k = 0; k < p.rank; k++)
            product[k * p.rows + i] = dot_lanes(x + i * p.columns, q + k * p.columns, p.columns);
}

// q = M^T P, columns begin ... end - 1: rows are added one after the other.
INLINE void back_columns(const float* x, const Part& p, const float* left, float* q, i64 begin,
                         i64 end) {
    for (i64 at = begin; at < end; at += TILE) {
        const i64 width = std::min(TILE, end - at);
        for (i64 k = 0; k < p.rank; k++) std::fill_n(q + k * p.columns + at, width, 0.0f);
        for (i64 i = 0; i < p.rows; i++)
            for (i64 k = 0; k < p.rank; k++) {
                const float factor = left[k * p.rows + i], *row = x + i * p.columns + at;
                float* to = q + k * p.columns + at;
                for (i64 j = 0; j < width; j++) to[j] += factor * row[j];
            }
    }
}

// out += weight * P Q^T, rows begin ... end - 1.
INLINE void expand_rows(const Part& p, const float* left, const float* q, float weight, float* out,
                        i64 begin, i64 end) {
    alignas(64) float said[TILE];
    for (i64 i = begin; i < end; i++)
        for (i64 at = 0; at < p.columns; at += TILE) {
            const i64 width = std::min(TILE, p.columns - at);
            for (i64 j = 0; j < width; j++) said[j] = left[i] * q[at + j];
            for (i64 k = 1; k < p.rank; k++) {
                const float factor = left[k * p.rows + i], *row = q + k * p.columns + at;
                for (i64 j = 0; j < width; j++) said[j] += factor * row[j];
            }
            float* to = out + i * p.columns + at;
            for (i64 j = 0; j < width; j++) to[j] += weight * said[j];
        }
}

// x -= factor * y.
INLINE void take_times(double* x, const double* y, double factor, i64 n) {
    for (i64 i = 0; i < n; i++) x[i] -= factor * y[i];
}

// `powersgd_orthonormal` of the reference, for `rank` columns of n floats, in place.
INLINE void orthonormalise(float* columns, i64 rank, i64 n) {
    std::vector<double> made(columns, columns + rank * n);
    for (i64 k = 0; k < rank; k++) {
        double* v = made.data() + k * n;
        const double length = std::sqrt(dot_lanes(v, v, n));
        for (int pass = 0; pass < 2; pass++)
            for (i64 before = 0; before < k; before++) {
                const double* u = made.data() + before * n;
                take_times(v, u, dot_lanes(u, v, n), n);
            }
        const double norm = std::sqrt(dot_lanes(v, v, n));
        const bool fine = norm > LEAST_NORM * length;
        for (i64 i = 0; i < n; i++) v[i] = fine ? v[i] / norm : 0.0;
    }
    for (i64 i = 0; i < rank * n; i++) columns[i] = float(made[i]);
}

// Each loop as it is, and compiled for AVX2: the same additions in the same order.
#if HAVE_AVX2
#define BOTH(name, arguments, call)             \
    void name##_plain arguments { call; }       \
    AVX2 void name##_avx2 arguments { call; }   \
    auto name##_here() { return avx2 ? name##_avx2 : name##_plain; }
#else
#define BOTH(name, arguments, call)             \
    void name##_plain arguments { call; }       \
    auto name##_here() { return name##_plain; }
#endif

BOTH(project, (const float* x, const Part& p, const float* q, float* product, i64 begin, i64 end),
     project_rows(x, p, q, product, begin, end))
BOTH(back, (const float* x, const Part& p, const float* left, float* q, i64 begin, i64 end),
     back_columns(x, p, left, q, begin, end))
BOTH(expand, (const Part& p, const float* left, const float* q, float weight, float* out, i64 begin,
              i64 end), expand_rows(p, left, q, weight, out, begin, end))
BOTH(orthonormal, (float* columns, i64 rank, i64 n), orthonormalise(columns, rank, n))

// How many floats come before what MPI adds.
i64 common_floats(const Part* parts, i64 count) {
    i64 common = 0;
    for (i64 k = 0; k < count; k++) common += parts[k].rank * parts[k].rows;
    return common;
}

bool within(const u8* data, i64 n, float most) {
    bool fine = true;
    for (i64 i = 0; i < n; i++) fine &= std::fabs(get<float>(data + 4 * i)) <= most;
    return fine;
}

// Can `mp_powersgd_encode` have written this?
bool factors_fit(const u8* data, const Part* parts, i64 count) {
    i64 to = common_floats(parts, count);
    if (!within(data, to, 1.0f)) return false;
    for (i64 k = 0; k < count; k++) {
        const u8* rest = data + 4 * to;
        const i64 size = parts[k].rest();
        if (!(parts[k].rank ? within(rest, size, MOST_FACTOR) : finite_bytes(rest, size)))
            return false;
        to += size;
    }
    return true;
}

}  // namespace

// product = M Q of each matrix.
API void mp_powersgd_project(const float* x, const Part* parts, i64 count, const float* basis,
                             float* product) {
    for (i64 k = 0; k < count; k++) {
        const Part& p = parts[k];
        if (p.rank)
            split(p.rows, 1, std::max<i64>(1, grain / std::max<i64>(1, p.columns)),
                  [&](int, i64 begin, i64 end) {
                      project_here()(x + p.start, p, basis + p.start, product, begin, end);
                  });
        product += p.rank * p.rows;
    }
}

// orth(P) of each matrix, of `product`; then M^T orth(P), or the tensor. INVALID: P is infinite.
API i64 mp_powersgd_encode(const float* x, const Part* parts, i64 count, const float* product,
                           u8* data) {
    const i64 common = common_floats(parts, count);
    if (!finite(product, common)) return INVALID;
    u8* rest = data + 4 * common;
    std::vector<float> left, right;
    for (i64 k = 0; k < count; k++) {
        const Part& p = parts[k];
        if (p.rank) {
            left.assign(product, product + p.rank * p.rows);
            right.resize(p.rank * p.columns);
            orthonormal_here()(left.data(), p.rank, p.rows);
            split(p.columns, TILE, std::max<i64>(1, grain / std::max<i64>(1, p.rows)),
                  [&](int, i64 begin, i64 end) {
                      back_here()(x + p.start, p, left.data(), right.data(), begin, end);
                  });
            std::memcpy(data, left.data(), 4 * left.size());
            std::memcpy(rest, right.data(), 4 * right.size());
        } else if (p.size()) {
            std::memcpy(rest, x + p.start, 4 * p.size());
        }
        product += p.rank * p.rows;
        data += 4 * p.rank * p.rows;
        rest += 4 * p.rest();
    }
    return 0;
}

// out += weight * (P Q^T or the tensor); INVALID where no encoder wrote this.
API i64 mp_powersgd_decode(const u8* data, const Part* parts, i64 count, float weight, float* out) {
    if (!factors_fit(data, parts, count)) return INVALID;
    const u8* rest = data + 4 * common_floats(parts, count);
    std::vector<float> left, right;
    for (i64 k = 0; k < count; k++) {
        const Part& p = parts[k];
        float* to = out + p.start;
        if (p.rank) {
            left.resize(p.rank * p.rows);
            right.resize(p.rank * p.columns);
            std::memcpy(left.data(), data, 4 * left.size());
            std::memcpy(right.data(), rest, 4 * right.size());
            split(p.rows, 1, std::max<i64>(1, grain / std::max<i64>(1, p.columns)),
                  [&](int, i64 begin, i64 end) {
                      expand_here()(p, left.data(), right.data(), weight, to, begin, end);
                  });
        } else {
            for (i64 i = 0; i < p.size(); i++) to[i] += weight * get<float>(rest + 4 * i);
        }
        data += 4 * p.rank * p.rows;
        rest += 4 * p.rest();
    }
    return 0;
}

// basis = orth(Q) of each matrix, drawn from -1 to 1 where that is zero; INVALID as above.
API i64 mp_powersgd_learn(const u8* data, const Part* parts, i64 count, u64 seed, u32 rank,
                          u32 step, u32 bucket, float* basis) {
    if (!factors_fit(data, parts, count)) return INVALID;
    const Philox key{bucket, step, rank, u32(seed), u32(seed >> 32)};
    const u8* rest = data + 4 * common_floats(parts, count);
    std::vector<u32> room;
    for (i64 k = 0; k < count; k++) {
        const Part& p = parts[k];
        float* q = basis + p.start;
        if (p.rank) {
            std::memcpy(q, rest, 4 * p.rest());
            orthonormal_here()(q, p.rank, p.columns);
        }
        for (i64 column = 0; column < p.rank; column++, q += p.columns) {
            if (std::any_of(q, q + p.columns, [](float v) { return v != 0; })) continue;
            room.resize(p.columns + 8);
            const u32* words = philox_words(key, q - basis, p.columns, room.data());
            for (i64 j = 0; j < p.columns; j++)
                q[j] = float(words[j] >> 8) * 0x1p-24f * 2.0f - 1.0f;
        }
        rest += 4 * p.rest();
    }
    return 0;
}
