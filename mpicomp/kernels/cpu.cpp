// The compiled kernels for the CPU: the bytes and floats of kernels/reference, in one pass over memory.
//
// Plain C functions that cpu.py calls through ctypes, without the interpreter's lock. Buffers belong
// to the caller. `data` is payload and may begin at any byte; float arrays are aligned as such. The
// plain loops say what is meant, AVX2 beside them does the same faster: additions in the same order,
// no fused multiply-add (-ffp-contract=off), so both give the same bits, with any number of threads.
//
// Streaming stores: where an array of more than STREAM elements is only written, its old content is
// not fetched first. That is a third of the memory traffic of v = a + b.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_AVX2 1
#define AVX2 __attribute__((target("avx2,f16c")))
#include <immintrin.h>
#else
#define HAVE_AVX2 0
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "payloads are little endian; this machine uses the reference kernels"
#endif

#define API extern "C" __attribute__((visibility("default")))

namespace {

using i64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

constexpr i64 GRAIN = 1 << 17;   // a thread is not worth starting for fewer elements
constexpr i64 STREAM = 1 << 20;  // arrays of so many elements are written past the caches
constexpr i64 CHUNK = 4096;      // elements of output that several packets are summed into at once
constexpr int MOST_THREADS = 64;
constexpr i64 INVALID = -1;      // returned for a packet that no encoder wrote

template <class T> inline T get(const u8* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T> inline void put(u8* to, T value) { std::memcpy(to, &value, sizeof value); }

inline u32 bits_of(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(u32 bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// ---- where it runs ------------------------------------------------------------------------------

bool cpu_has_avx2() {
#if HAVE_AVX2
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

bool avx2 = cpu_has_avx2();
int threads = 1;

// f(part, begin, end) over all of 0 ... n - 1, in as many parts as there are threads; parts begin at
// multiples of `multiple`. Threads live for one call: nothing is left running that a fork would lose.
template <class F> void split(i64 n, i64 multiple, i64 grain, const F& f) {
    const i64 parts = std::min<i64>(threads, n / grain);
    if (parts <= 1) return f(0, i64(0), n);
    const i64 each = (n / parts / multiple + 1) * multiple;
    std::vector<std::thread> team;
    for (i64 part = 1; part < parts && part * each < n; part++) {
        const i64 begin = part * each, end = part == parts - 1 ? n : std::min(n, begin + each);
        try {
            team.emplace_back([&f, part, begin, end] { f(int(part), begin, end); });
        } catch (const std::system_error&) {  // no thread to be had
            f(int(part), begin, end);
        }
    }
    f(0, i64(0), std::min(n, each));
    for (auto& thread : team) thread.join();
}

// to[0 ... n - 1] = from, past the caches if `stream`.
#if HAVE_AVX2
AVX2 void copy_avx2(const float* from, float* to, i64 n, bool stream) {
    i64 i = 0;
    if (stream) {
        for (; i < n && reinterpret_cast<uintptr_t>(to + i) % 32; i++) to[i] = from[i];
        for (; i + 8 <= n; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
        _mm_sfence();
    }
    std::memcpy(to + i, from + i, 4 * (n - i));
}
#endif

void copy(const float* from, float* to, i64 n, bool stream) {
#if HAVE_AVX2
    if (avx2) return copy_avx2(from, to, n, stream);
#endif
    std::memcpy(to, from, 4 * n);
}

// What `decode(packet, begin, count, out)` adds, summed over packets. If `fresh`, `out` starts from
// zero and is written once; the sum of a chunk is made in cache, packet after packet.
template <class D> void add_packets(i64 packets, float* out, i64 n, bool fresh, const D& decode) {
    split(n, CHUNK, GRAIN, [&](int, i64 begin, i64 end) {
        alignas(64) float chunk[CHUNK];
        for (i64 at = begin; at < end; at += CHUNK) {
            const i64 count = std::min(CHUNK, end - at);
            if (fresh) std::memset(chunk, 0, 4 * count);
            for (i64 p = 0; p < packets; p++) decode(p, at, count, fresh ? chunk : out + at);
            if (fresh) copy(chunk, out + at, count, n >= STREAM);
        }
    });
}

// ---- sums and small things ----------------------------------------------------------------------

bool finite(const float* x, i64 n) {
    u32 seen = 0;  // the sum has the top bit where the exponent is all ones
    for (i64 i = 0; i < n; i++) seen |= (bits_of(x[i]) & 0x7F800000u) + 0x00800000u;
    return !(seen >> 31);
}

// `fold` of the reference for rows of `width` numbers, fed with the sums of its blocks of 32 rows.
// Level k is the running sum of up to 32 finished sums of level k - 1. (0 + s = s for each sum s:
// they begin with +0, so none is -0, and one level more than the reference has changes nothing.)
template <class T> class Fold {
  public:
    static constexpr int LEVELS = 7;  // 32 * 32**7 rows

    // `memory` holds LEVELS * width numbers.
    Fold(T* memory, i64 width) : sums_(memory), width_(width) {
        std::memset(sums_, 0, sizeof(T) * LEVELS * width);
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
        std::memset(sum, 0, sizeof(T) * width_);
        count_[level] = 0;
    }

    T* sums_;
    i64 width_;
    int count_[LEVELS] = {};
};

}  // namespace

API int mp_version() { return 1; }  // counts changes of these functions; cpu.py expects the same

API int mp_avx2(int on) {  // on < 0 asks
    if (on >= 0) avx2 = on && cpu_has_avx2();
    return avx2;
}

API int mp_threads(int count) {  // count < 1 asks
    if (count >= 1) threads = std::min(count, MOST_THREADS);
    return threads;
}

API int mp_finite(const float* x, i64 n) {
    std::atomic<bool> fine{true};
    split(n, 1, GRAIN, [&](int, i64 begin, i64 end) {
        for (i64 at = begin; at < end && fine; at += 1 << 16)
            if (!finite(x + at, std::min<i64>(1 << 16, end - at))) fine = false;
    });
    return fine;
}

// ---- dense and casts ----------------------------------------------------------------------------

namespace {

enum Kind { FLOAT32, FLOAT16, BFLOAT16 };

u16 half_of(float x) {
    const u32 sign = bits_of(x) >> 16 & 0x8000;
    u32 a = std::min<u32>(bits_of(x) & 0x7FFFFFFF, 0x477FE000);       // 65504
    if (a < 0x38800000)                                               // subnormal: steps of 2**-24
        return u16(sign | (bits_of(float_of(a) + 0.5f) - 0x3F000000));  // as have floats from 0.5 on
    a += 0xFFF + (a >> 13 & 1);
    return u16(sign | (a - 0x38000000) >> 13);
}

float widen_half(u16 half) {
    const u32 sign = u32(half & 0x8000) << 16, a = half & 0x7FFF;
    if (a < 0x400) return float_of(bits_of(float(a) * 5.9604644775390625e-8f) | sign);  // 2**-24
    return float_of(sign | ((a << 13) + (a < 0x7C00 ? 0x38000000 : 0x70000000)));
}

u16 bfloat_of(float x) {
    const u32 bits = bits_of(x);
    const u32 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const bool overflow = (bits & 0x7FFFFFFF) < 0x7F800000 && (rounded & 0x7FFF) >= 0x7F80;
    const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    return u16(nan ? bits >> 16 | 0x40 : rounded - overflow);
}

void half_encode_plain(const float* x, i64 n, u8* data) {
    for (i64 i = 0; i < n; i++) put(data + 2 * i, half_of(x[i]));
}

void half_add_plain(const u8* data, i64 n, float weight, float* out) {
    for (i64 i = 0; i < n; i++) out[i] += widen_half(get<u16>(data + 2 * i)) * weight;
}

#if HAVE_AVX2
AVX2 void half_encode_avx2(const float* x, i64 n, u8* data) {
    const __m256 most = _mm256_set1_ps(65504), least = _mm256_set1_ps(-65504);
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 v = _mm256_max_ps(least, _mm256_min_ps(most, _mm256_loadu_ps(x + i)));
        const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(data + 2 * i), half);
    }
    half_encode_plain(x + i, n - i, data + 2 * i);
}

AVX2 void half_add_avx2(const u8* data, i64 n, float weight, float* out) {
    const __m256 w = _mm256_set1_ps(weight);
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + 2 * i));
        const __m256 v = _mm256_mul_ps(_mm256_cvtph_ps(half), w);
        _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_loadu_ps(out + i), v));
    }
    half_add_plain(data + 2 * i, n - i, weight, out + i);
}
#endif

// Is any exponent all ones? `top` is the exponent's mask, `step` its lowest bit.
bool finite16(const u8* data, i64 n, u16 top, u16 step) {
    u16 seen = 0;
    for (i64 i = 0; i < n; i++) seen |= u16((get<u16>(data + 2 * i) & top) + step);
    return !(seen >> 15);
}

}  // namespace

API void mp_cast_encode(const float* x, i64 n, int kind, u8* data) {
    split(n, 1, GRAIN, [&](int, i64 begin, i64 end) {
        const i64 count = end - begin;
        const float* from = x + begin;
        u8* to = data + 2 * begin;
        if (kind == BFLOAT16) {
            for (i64 i = 0; i < count; i++) put(to + 2 * i, bfloat_of(from[i]));
            return;
        }
#if HAVE_AVX2
        if (avx2) return half_encode_avx2(from, count, to);
#endif
        half_encode_plain(from, count, to);
    });
}

// out += or, if fresh, = the sum over packets of weight * the floats; INVALID if a 16-bit one is not
// finite.
API i64 mp_float_decode(const u8* const* data, i64 packets, int kind, float weight, float* out, i64 n,
                        int fresh) {
    const u16 top = kind == FLOAT16 ? 0x7C00 : 0x7F80, step = kind == FLOAT16 ? 0x0400 : 0x0080;
    std::atomic<bool> bad{false};
    add_packets(packets, out, n, fresh, [&](i64 p, i64 at, i64 count, float* to) {
        if (kind == FLOAT32) {
            const u8* from = data[p] + 4 * at;
            for (i64 i = 0; i < count; i++) to[i] += get<float>(from + 4 * i) * weight;
            return;
        }
        const u8* from = data[p] + 2 * at;
        if (!finite16(from, count, top, step)) bad = true;
        if (kind == BFLOAT16) {
            for (i64 i = 0; i < count; i++)
                to[i] += float_of(u32(get<u16>(from + 2 * i)) << 16) * weight;
            return;
        }
#if HAVE_AVX2
        if (avx2) return half_add_avx2(from, count, weight, to);
#endif
        half_add_plain(from, count, weight, to);
    });
    return bad ? INVALID : 0;
}

// ---- Strom: elements beyond a threshold, as words index << 1 | positive --------------------------

namespace {

struct Threshold {
    float tau;
    bool strict;
    bool passes(float v) const { return strict ? std::fabs(v) > tau : std::fabs(v) >= tau; }
};

// The words of elements begin ... end - 1 of owed + grad (of grad, if `owed` is null) go to `words`,
// what is still owed goes to `out`. Returns the end of the words.
u8* strom_plain(const float* grad, const float* owed, float* out, i64 begin, i64 end, Threshold t,
                u8* words) {
    const float minus = -1.0f * t.tau;
    for (i64 i = begin; i < end; i++) {
        float v = owed ? owed[i] + grad[i] : grad[i];
        if (t.passes(v)) {
            put(words, u32(i) << 1 | (v > 0));
            words += 4;
            v += v > 0 ? minus : -minus;
        }
        if (owed) out[i] = v;
    }
    return words;
}

#if HAVE_AVX2
// 32 elements at a time; those that pass are so few that one branch over all 32 pays.
template <bool OWED, bool STRICT>
AVX2 u8* strom_avx2(const float* grad, const float* owed, float* out, i64 begin, i64 end, Threshold t,
                    bool stream, u8* words) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    const __m256 tau = _mm256_set1_ps(t.tau);
    i64 i = begin;
    while (stream && i < end && reinterpret_cast<uintptr_t>(out + i) % 32)
        words = strom_plain(grad, owed, out, i, i + 1, t, words), i++;
    for (; i + 32 <= end; i += 32) {
        __m256 v[4], hit[4];
        for (int k = 0; k < 4; k++) {
            v[k] = _mm256_loadu_ps(grad + i + 8 * k);
            if (OWED) v[k] = _mm256_add_ps(_mm256_loadu_ps(owed + i + 8 * k), v[k]);
            hit[k] = _mm256_cmp_ps(_mm256_and_ps(v[k], magnitude), tau,
                                   STRICT ? _CMP_GT_OQ : _CMP_GE_OQ);
        }
        const __m256 any = _mm256_or_ps(_mm256_or_ps(hit[0], hit[1]), _mm256_or_ps(hit[2], hit[3]));
        if (_mm256_movemask_ps(any)) {
            alignas(32) float group[32];
            u32 mask = 0;
            for (int k = 0; k < 4; k++) {
                _mm256_store_ps(group + 8 * k, v[k]);
                mask |= u32(_mm256_movemask_ps(hit[k])) << 8 * k;
            }
            const float minus = -1.0f * t.tau;
            for (; mask; mask &= mask - 1) {
                const int at = __builtin_ctz(mask);
                const bool positive = group[at] > 0;
                put(words, u32(i + at) << 1 | positive);
                words += 4;
                group[at] += positive ? minus : -minus;
            }
            for (int k = 0; k < 4; k++) v[k] = _mm256_load_ps(group + 8 * k);
        }
        if (!OWED) continue;
        for (int k = 0; k < 4; k++)
            if (stream) _mm256_stream_ps(out + i + 8 * k, v[k]);
            else _mm256_storeu_ps(out + i + 8 * k, v[k]);
    }
    if (stream) _mm_sfence();
    return strom_plain(grad, owed, out, i, end, t, words);
}
#endif

u8* strom_scan(const float* grad, const float* owed, float* out, i64 begin, i64 end, Threshold t,
               bool stream, u8* words) {
#if HAVE_AVX2
    if (avx2) {
        const auto scan = owed ? t.strict ? strom_avx2<true, true> : strom_avx2<true, false>
                               : t.strict ? strom_avx2<false, true> : strom_avx2<false, false>;
        return scan(grad, owed, out, begin, end, t, stream, words);
    }
#endif
    return strom_plain(grad, owed, out, begin, end, t, words);
}

// Where the words of one packet stand, and which of them is next.
struct Words {
    const u8* data;
    i64 count, next = 0;
    i64 index(i64 i) const { return get<u32>(data + 4 * i) >> 1; }

    bool ascend_below(i64 n) const {
        i64 descents = 0, last = -1;
        for (i64 i = 0; i < count; i++) {
            descents += index(i) <= last;
            last = index(i);
        }
        return !descents && last < n;
    }

    void seek(i64 element) {  // the first word at or after this element
        i64 low = 0, high = count;
        while (low < high) {
            const i64 middle = (low + high) / 2;
            if (index(middle) < element) low = middle + 1;
            else high = middle;
        }
        next = low;
    }
};

}  // namespace

// `owed` and `out` null: encodes `grad`. Room for 4 * n bytes in `data`. Returns the bytes used.
API i64 mp_strom_encode(const float* grad, const float* owed, float* out, i64 n, float tau, int strict,
                        u8* data) {
    const bool stream = owed && out != owed && n >= STREAM;
    i64 begins[MOST_THREADS] = {}, used[MOST_THREADS] = {};
    split(n, 32, GRAIN, [&](int part, i64 begin, i64 end) {  // each part where it would be, were all sent
        begins[part] = begin;
        u8* words = data + 4 * begin;
        used[part] = strom_scan(grad, owed, out, begin, end, {tau, strict != 0}, stream, words) - words;
    });
    i64 total = 0;
    for (int part = 0; part < MOST_THREADS; part++) {
        if (used[part] && total != 4 * begins[part])
            std::memmove(data + total, data + 4 * begins[part], used[part]);
        total += used[part];
    }
    return total;
}

// out += or, if fresh, = the sum over packets of +-(weight * tau) at the indices named. `sizes` in
// bytes. INVALID unless indices ascend and stay below n; `out` is then as it was.
API i64 mp_strom_decode(const u8* const* data, const i64* sizes, i64 packets, float tau, float weight,
                        float* out, i64 n, int fresh) {
    for (i64 p = 0; p < packets; p++)
        if (!Words{data[p], sizes[p] / 4}.ascend_below(n)) return INVALID;
    const float quantum = weight * tau, level[2] = {-quantum, quantum};
    split(n, CHUNK, GRAIN, [&](int, i64 begin, i64 end) {
        std::vector<Words> words;
        for (i64 p = 0; p < packets; p++) {
            words.push_back({data[p], sizes[p] / 4});
            words.back().seek(begin);
        }
        for (i64 at = begin; at < end; at += CHUNK) {
            const i64 stop = fresh ? std::min(end, at + CHUNK) : end;
            if (fresh) std::memset(out + at, 0, 4 * (stop - at));
            for (auto& w : words)
                for (; w.next < w.count && w.index(w.next) < stop; w.next++)
                    out[w.index(w.next)] += level[get<u32>(w.data + 4 * w.next) & 1];
            if (!fresh) return;
        }
    });
    return 0;
}

// ---- 1-bit SGD: two means a column and a bit an element -------------------------------------------

namespace {

constexpr i64 SCRATCH = 1 << 17;  // floats that a strip of columns may take in cache
constexpr i64 MOST_SCRATCH = 1 << 21;
constexpr i64 WIDEST = 1024;      // columns of a strip

// A strip of columns on its way: v = owed + grad of all its rows is kept, in scratch or in `out`.
struct Strip {
    const float *grad, *owed;
    float* v;
    i64 pitch, v_pitch, width;  // elements from row to row of grad and owed, of v; columns
};

// Up to 32 rows from `row` on: bits to `word`, sums of the non-negative and the negative to `positive`
// and `negative`, one row after the other; `from` is the first column. v is kept if there is `owed`.
void onebit_rows_plain(const Strip& s, i64 row, int rows, i64 from, u32* word, float* positive,
                       float* negative) {
    for (int r = 0; r < rows; r++) {
        const i64 at = (row + r) * s.pitch;
        for (i64 c = from; c < s.width; c++) {
            const float v = s.owed ? s.owed[at + c] + s.grad[at + c] : s.grad[at + c];
            if (s.owed) s.v[(row + r) * s.v_pitch + c] = v;
            const bool bit = v >= 0;
            word[c] |= u32(bit) << r;
            positive[c] += bit ? v : 0.0f;
            negative[c] += bit ? 0.0f : v;
        }
    }
}

#if HAVE_AVX2
// ROWS rows, of which the first has bit `first`; sums stay in registers while they are added.
template <bool OWED, int ROWS>
AVX2 inline void onebit_few_rows(const Strip& s, i64 row, int first, i64 width, u32* word,
                                 float* positive, float* negative) {
    const __m256 zero = _mm256_setzero_ps();
    const float* grad = s.grad + row * s.pitch;
    const float* owed = s.owed + (OWED ? row * s.pitch : 0);
    float* keep = s.v + (OWED ? row * s.v_pitch : 0);
    for (i64 c = 0; c < width; c += 8) {
        __m256 up = _mm256_loadu_ps(positive + c), low = _mm256_loadu_ps(negative + c);
        __m256i bits = _mm256_loadu_si256(reinterpret_cast<__m256i*>(word + c));
        for (int r = 0; r < ROWS; r++) {
            __m256 v = _mm256_loadu_ps(grad + r * s.pitch + c);
            if (OWED) {
                v = _mm256_add_ps(_mm256_loadu_ps(owed + r * s.pitch + c), v);
                _mm256_storeu_ps(keep + r * s.v_pitch + c, v);
            }
            const __m256 bit = _mm256_cmp_ps(v, zero, _CMP_GE_OQ);
            up = _mm256_add_ps(up, _mm256_and_ps(bit, v));
            low = _mm256_add_ps(low, _mm256_andnot_ps(bit, v));
            const __m256i place = _mm256_set1_epi32(int(1u << (first + r)));
            bits = _mm256_or_si256(bits, _mm256_and_si256(_mm256_castps_si256(bit), place));
        }
        _mm256_storeu_ps(positive + c, up);
        _mm256_storeu_ps(negative + c, low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(word + c), bits);
    }
}

template <bool OWED>
AVX2 void onebit_rows_avx2(const Strip& s, i64 row, int rows, u32* word, float* positive,
                           float* negative) {
    const i64 width = s.width / 8 * 8;
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        onebit_few_rows<OWED, 4>(s, row + r, r, width, word, positive, negative);
    for (; r < rows; r++)
        onebit_few_rows<OWED, 1>(s, row + r, r, width, word, positive, negative);
    if (width < s.width) onebit_rows_plain(s, row, rows, width, word, positive, negative);
}
#endif

void onebit_rows(const Strip& s, i64 row, int rows, u32* word, float* positive, float* negative) {
#if HAVE_AVX2
    if (avx2)
        return (s.owed ? onebit_rows_avx2<true> : onebit_rows_avx2<false>)(s, row, rows, word,
                                                                          positive, negative);
#endif
    onebit_rows_plain(s, row, rows, 0, word, positive, negative);
}

// out = v + (v >= 0 ? upper : lower) for one row.
void onebit_settle_plain(const float* v, const float* lower, const float* upper, i64 width,
                         float* out) {
    for (i64 c = 0; c < width; c++) out[c] = v[c] + (v[c] >= 0 ? upper[c] : lower[c]);
}

#if HAVE_AVX2
AVX2 void onebit_settle_avx2(const float* v, const float* lower, const float* upper, i64 width,
                             float* out, bool stream) {
    i64 c = 0;
    while (stream && c < width && reinterpret_cast<uintptr_t>(out + c) % 32) c++;
    onebit_settle_plain(v, lower, upper, c, out);
    for (; c + 8 <= width; c += 8) {
        const __m256 x = _mm256_loadu_ps(v + c);
        const __m256 bit = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ);
        const __m256 mean = _mm256_blendv_ps(_mm256_loadu_ps(lower + c), _mm256_loadu_ps(upper + c), bit);
        if (stream) _mm256_stream_ps(out + c, _mm256_add_ps(x, mean));
        else _mm256_storeu_ps(out + c, _mm256_add_ps(x, mean));
    }
    onebit_settle_plain(v + c, lower + c, upper + c, width - c, out + c);
}
#endif

void onebit_settle(const float* v, const float* lower, const float* upper, i64 width, float* out,
                   bool stream) {
#if HAVE_AVX2
    if (avx2) return onebit_settle_avx2(v, lower, upper, width, out, stream);
#endif
    onebit_settle_plain(v, lower, upper, width, out);
}

// The means from the sums of the non-negative and the negative values, where `count` are the former.
void onebit_means(const float* positive, const float* negative, const i64* count, i64 rows, i64 width,
                  float* lower, float* upper) {
    for (i64 c = 0; c < width; c++) {
        upper[c] = positive[c] / float(std::max<i64>(count[c], 1));
        lower[c] = negative[c] / float(std::max<i64>(rows - count[c], 1));
    }
}

void count_bits(const u32* word, i64 width, i64* count) {
    for (i64 c = 0; c < width; c++) {
        u32 w = word[c] - (word[c] >> 1 & 0x55555555);
        w = (w & 0x33333333) + (w >> 2 & 0x33333333);
        w = (w + (w >> 4)) & 0x0F0F0F0F;
        w += w >> 8;
        count[c] += (w + (w >> 16)) & 63;
    }
}

// One strip of columns from `first` on; INVALID if a mean is not finite and there is `owed`.
i64 onebit_strip(const Strip& s, i64 rows, i64 columns, i64 first, float* out, bool stream, u8* data) {
    alignas(64) float memory[2 * Fold<float>::LEVELS * WIDEST], block[2 * WIDEST];
    alignas(64) u32 word[WIDEST];
    i64 count[WIDEST] = {};
    const i64 width = s.width;
    Fold<float> fold(memory, 2 * width);
    for (i64 row = 0; row < rows; row += 32) {
        std::fill(block, block + 2 * width, 0.0f);
        std::fill(word, word + width, 0);
        onebit_rows(s, row, int(std::min<i64>(32, rows - row)), word, block, block + width);
        fold.add(block);
        count_bits(word, width, count);
        std::memcpy(data + 4 * (columns * (2 + row / 32) + first), word, 4 * width);
    }
    const float* sum = fold.result();
    float *lower = block, *upper = block + width;
    onebit_means(sum, sum + width, count, rows, width, lower, upper);
    std::memcpy(data + 4 * first, lower, 4 * width);
    std::memcpy(data + 4 * (columns + first), upper, 4 * width);
    if (!s.owed) return 0;
    if (!finite(block, 2 * width)) return INVALID;
    for (i64 c = 0; c < 2 * width; c++) block[c] *= -1.0f;
    for (i64 row = 0; row < rows; row++)
        onebit_settle(s.v + row * s.v_pitch, lower, upper, width, out + row * columns + first, stream);
    return 0;
}

#if HAVE_AVX2
// Eight blocks of 32 consecutive elements: lane b of the sums belongs to block b.
template <bool OWED>
AVX2 void onebit_blocks_avx2(const float* grad, const float* owed, float* v, u32* word,
                             float* positive, float* negative) {
    __m256 up = _mm256_setzero_ps(), low = up;
    std::fill(word, word + 8, 0);
    for (int k = 0; k < 4; k++) {
        __m256 a[8], b[8];
        for (int i = 0; i < 8; i++) {
            const i64 at = 32 * i + 8 * k;
            a[i] = _mm256_loadu_ps(grad + at);
            if (OWED) {
                a[i] = _mm256_add_ps(_mm256_loadu_ps(owed + at), a[i]);
                _mm256_storeu_ps(v + at, a[i]);
            }
            const __m256 bit = _mm256_cmp_ps(a[i], _mm256_setzero_ps(), _CMP_GE_OQ);
            word[i] |= u32(_mm256_movemask_ps(bit)) << 8 * k;
        }
        for (int i = 0; i < 8; i += 4)  // turn rows into columns: pairs, quads, halves
            for (int j = 0; j < 2; j++) {
                const __m256 p = a[i + j], q = a[i + j + 2];  // rows j and j + 2 of four
                b[i + 2 * j] = _mm256_unpacklo_ps(p, q);
                b[i + 2 * j + 1] = _mm256_unpackhi_ps(p, q);
            }
        for (int i = 0; i < 8; i += 4)
            for (int j = 0; j < 2; j++) {
                a[i + 2 * j] = _mm256_unpacklo_ps(b[i + j], b[i + j + 2]);
                a[i + 2 * j + 1] = _mm256_unpackhi_ps(b[i + j], b[i + j + 2]);
            }
        for (int j = 0; j < 4; j++) {
            b[j] = _mm256_permute2f128_ps(a[j], a[j + 4], 0x20);
            b[j + 4] = _mm256_permute2f128_ps(a[j], a[j + 4], 0x31);
        }
        for (int j = 0; j < 8; j++) {
            const __m256 bit = _mm256_cmp_ps(b[j], _mm256_setzero_ps(), _CMP_GE_OQ);
            up = _mm256_add_ps(up, _mm256_and_ps(bit, b[j]));
            low = _mm256_add_ps(low, _mm256_andnot_ps(bit, b[j]));
        }
    }
    _mm256_storeu_ps(positive, up);
    _mm256_storeu_ps(negative, low);
}
#endif

// A matrix of one column: a vector. v = owed + grad is kept in `out`.
i64 onebit_column(const float* grad, const float* owed, float* out, i64 rows, u8* data) {
    float memory[2 * Fold<float>::LEVELS], positive[8], negative[8];
    u32 word[8];
    i64 count = 0;
    Fold<float> fold(memory, 2);
    for (i64 row = 0; row < rows;) {
        const float* more = owed ? owed + row : nullptr;
        int blocks = 1;
#if HAVE_AVX2
        if (avx2 && rows - row >= 256) {
            blocks = 8;
            (owed ? onebit_blocks_avx2<true> : onebit_blocks_avx2<false>)(
                grad + row, more, out + (owed ? row : 0), word, positive, negative);
        }
#endif
        if (blocks == 1) {
            word[0] = 0, positive[0] = negative[0] = 0;
            onebit_rows_plain({grad + row, more, out + (owed ? row : 0), 1, 1, 1}, 0,
                              int(std::min<i64>(32, rows - row)), 0, word, positive, negative);
        }
        for (int b = 0; b < blocks; b++, row += 32) {
            const float block[2] = {positive[b], negative[b]};
            fold.add(block);
            count_bits(word + b, 1, &count);
            put(data + 8 + row / 8, word[b]);
        }
    }
    float lower[WIDEST], upper[WIDEST];
    onebit_means(fold.result(), fold.result() + 1, &count, rows, 1, lower, upper);
    put(data, lower[0]);
    put(data + 4, upper[0]);
    if (!owed) return 0;
    if (!finite(lower, 1) || !finite(upper, 1)) return INVALID;
    std::fill(lower, lower + WIDEST, -1.0f * lower[0]);
    std::fill(upper, upper + WIDEST, -1.0f * upper[0]);
    for (i64 at = 0; at < rows; at += WIDEST)
        onebit_settle(out + at, lower, upper, std::min(WIDEST, rows - at), out + at, false);
    return 0;
}

}  // namespace

// `owed` and `out` null: encodes `grad`. INVALID if there is `owed` and a mean is not finite.
API i64 mp_onebit_encode(const float* grad, const float* owed, float* out, i64 rows, i64 columns,
                         u8* data) {
    if (columns == 1) return onebit_column(grad, owed, out, rows, data);
    i64 width = WIDEST;  // of a strip: as wide as keeps v in cache, between whole cache lines of `out`
    if (owed && rows) width = std::min(WIDEST, std::max<i64>(64, SCRATCH / rows / 16 * 16));
    const bool roomy = owed && rows * width <= MOST_SCRATCH;
    const i64 offset = reinterpret_cast<uintptr_t>(out) / 4 % 16;
    const bool stream = owed && roomy && columns % 16 == 0 && rows * columns >= STREAM;
    thread_local std::vector<float> scratch;
    if (roomy) scratch.resize(std::max<size_t>(scratch.size(), threads * rows * width));
    float* const memory = scratch.data();
    std::atomic<bool> bad{false};
    split(columns, 16, std::max<i64>(16, GRAIN / std::max<i64>(rows, 1)), [&](int part, i64 begin, i64 end) {
        for (i64 first = begin, stop; first < end; first = stop) {
            stop = std::min(end, (first + offset + width) / 16 * 16 - offset);
            Strip s{grad + first, owed ? owed + first : nullptr, memory + part * rows * width,
                    columns, width, stop - first};
            if (!roomy && owed) s.v = out + first, s.v_pitch = columns;
            if (onebit_strip(s, rows, columns, first, out, stream, data)) bad = true;
        }
    });
    return bad ? INVALID : 0;
}

namespace {

// out (from zero if `fresh`) += level[bit] for the `width` columns of one row, packet after packet.
// Packet p has its words at words[p] and its two rows of levels at levels + 2 * p * WIDEST.
void onebit_row_plain(const u8* const* words, const float* levels, i64 packets, int bit, i64 from,
                      i64 width, float* out, bool fresh) {
    for (i64 c = from; c < width; c++) {
        float sum = fresh ? 0.0f : out[c];
        for (i64 p = 0; p < packets; p++) {
            const u32 one = get<u32>(words[p] + 4 * c) >> bit & 1;
            sum += levels[(2 * p + one) * WIDEST + c];
        }
        out[c] = sum;
    }
}

#if HAVE_AVX2
AVX2 void onebit_row_avx2(const u8* const* words, const float* levels, i64 packets, int bit, i64 width,
                          float* out, bool fresh, bool stream) {
    const __m128i shift = _mm_cvtsi32_si128(31 - bit);  // the bit becomes the sign that blendv reads
    i64 c = 0;
    while (stream && c < width && reinterpret_cast<uintptr_t>(out + c) % 32) c++;
    onebit_row_plain(words, levels, packets, bit, 0, c, out, fresh);
    for (; c + 8 <= width; c += 8) {
        __m256 sum = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(out + c);
        for (i64 p = 0; p < packets; p++) {
            const float* level = levels + 2 * p * WIDEST + c;
            const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words[p] + 4 * c));
            const __m256 mask = _mm256_castsi256_ps(_mm256_sll_epi32(word, shift));
            sum = _mm256_add_ps(sum, _mm256_blendv_ps(_mm256_loadu_ps(level),
                                                      _mm256_loadu_ps(level + WIDEST), mask));
        }
        if (stream) _mm256_stream_ps(out + c, sum);
        else _mm256_storeu_ps(out + c, sum);
    }
    onebit_row_plain(words, levels, packets, bit, c, width, out, fresh);
}

// Whole words of a single column: 32 elements each.
AVX2 void onebit_column_avx2(const u8* words, i64 count, float lower, float upper, float* out) {
    const __m256 low = _mm256_set1_ps(lower), up = _mm256_set1_ps(upper);
    const __m256i shift = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    for (i64 w = 0; w < count; w++, out += 32) {
        const u32 word = get<u32>(words + 4 * w);
        for (int k = 0; k < 4; k++) {
            const __m256i bits = _mm256_sllv_epi32(_mm256_set1_epi32(int(word >> 8 * k)), shift);
            const __m256 level = _mm256_blendv_ps(low, up, _mm256_castsi256_ps(bits));
            _mm256_storeu_ps(out + 8 * k, _mm256_add_ps(_mm256_loadu_ps(out + 8 * k), level));
        }
    }
}
#endif

// Elements `at` ... at + count - 1 of a single column; `at` is a multiple of 32.
void onebit_column_add(const u8* data, i64 at, i64 count, float weight, float* out) {
    const float level[2] = {get<float>(data) * weight, get<float>(data + 4) * weight};
    const u8* words = data + 8 + at / 8;
    i64 i = 0;
#if HAVE_AVX2
    if (avx2) onebit_column_avx2(words, count / 32, level[0], level[1], out), i = count / 32 * 32;
#endif
    for (; i < count; i++) out[i] += level[get<u32>(words + i / 32 * 4) >> i % 32 & 1];
}

bool onebit_finite(const u8* data, i64 columns) {
    u32 seen = 0;
    for (i64 c = 0; c < 2 * columns; c++) seen |= (get<u32>(data + 4 * c) & 0x7F800000) + 0x00800000;
    return !(seen >> 31);
}

}  // namespace

// out += or, if fresh, = the sum over packets of weight * the mean that each bit stands for. INVALID
// if a mean is not finite; `out` is then as it was.
API i64 mp_onebit_decode(const u8* const* data, i64 packets, i64 rows, i64 columns, float weight,
                         float* out, int fresh) {
    for (i64 p = 0; p < packets; p++)
        if (!onebit_finite(data[p], columns)) return INVALID;
    if (columns == 1) {
        add_packets(packets, out, rows, fresh, [&](i64 p, i64 at, i64 count, float* to) {
            onebit_column_add(data[p], at, count, weight, to);
        });
        return 0;
    }
    const bool stream = fresh && columns % 16 == 0 && rows * columns >= STREAM;
    const i64 offset = reinterpret_cast<uintptr_t>(out) / 4 % 16;
    thread_local std::vector<float> memory;
    memory.resize(std::max<size_t>(memory.size(), threads * packets * 2 * WIDEST));
    float* const tables = memory.data();
    split(columns, 16, std::max<i64>(16, GRAIN / std::max<i64>(rows, 1)), [&](int part, i64 begin, i64 end) {
        float* levels = tables + part * packets * 2 * WIDEST;
        std::vector<const u8*> words(packets);
        for (i64 first = begin, stop; first < end; first = stop) {
            stop = std::min(end, (first + offset + WIDEST) / 16 * 16 - offset);
            const i64 width = stop - first;
            for (i64 p = 0; p < packets; p++)
                for (i64 c = 0; c < width; c++)
                    for (i64 k = 0; k < 2; k++)
                        levels[(2 * p + k) * WIDEST + c] =
                            get<float>(data[p] + 4 * (k * columns + first + c)) * weight;
            for (i64 row = 0; row < rows; row++) {
                for (i64 p = 0; p < packets; p++)
                    words[p] = data[p] + 4 * (columns * (2 + row / 32) + first);
                float* to = out + row * columns + first;
#if HAVE_AVX2
                if (avx2) {
                    onebit_row_avx2(words.data(), levels, packets, row % 32, width, to, fresh, stream);
                    continue;
                }
#endif
                onebit_row_plain(words.data(), levels, packets, row % 32, 0, width, to, fresh);
            }
        }
    });
    return 0;
}

// ---- Philox4x32-10 -------------------------------------------------------------------------------

namespace {

constexpr u32 M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85;

struct Philox {
    u32 bucket, step, rank, key0, key1;
};

// The words of `blocks` blocks from block `first` on, four each.
void philox_plain(const Philox& key, u64 first, i64 blocks, u32* words) {
    for (i64 b = 0; b < blocks; b++) {
        u32 c0 = u32(first + b), c1 = key.bucket, c2 = key.step, c3 = key.rank;
        u32 k0 = key.key0, k1 = key.key1;
        for (int round = 0; round < 10; round++, k0 += W0, k1 += W1) {
            const u64 p0 = u64(M0) * c0, p1 = u64(M1) * c2;
            c0 = u32(p1 >> 32) ^ c1 ^ k0, c1 = u32(p1);
            c2 = u32(p0 >> 32) ^ c3 ^ k1, c3 = u32(p0);
        }
        words[4 * b] = c0, words[4 * b + 1] = c1, words[4 * b + 2] = c2, words[4 * b + 3] = c3;
    }
}

#if HAVE_AVX2
// Four blocks a vector, a word in the lower half of each 64-bit lane; what stands in the upper halves
// is never read, for mul_epu32 takes the lower ones. Lanes hold blocks 0, 2, 1, 3, as unpack wants.
AVX2 void philox_avx2(const Philox& key, u64 first, i64 blocks, u32* words) {
    constexpr int VECTORS = 4;
    const __m256i m0 = _mm256_set1_epi64x(M0), m1 = _mm256_set1_epi64x(M1);
    const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);
    i64 b = 0;
    for (; b + 4 * VECTORS <= blocks; b += 4 * VECTORS) {
        __m256i c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            c0[v] = _mm256_add_epi64(_mm256_set1_epi64x(i64(first + b + 4 * v)), order);
            c1[v] = _mm256_set1_epi64x(key.bucket);
            c2[v] = _mm256_set1_epi64x(key.step);
            c3[v] = _mm256_set1_epi64x(key.rank);
        }
        u32 k0 = key.key0, k1 = key.key1;
        for (int round = 0; round < 10; round++, k0 += W0, k1 += W1) {
            const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
            for (int v = 0; v < VECTORS; v++) {
                const __m256i p0 = _mm256_mul_epu32(c0[v], m0), p1 = _mm256_mul_epu32(c2[v], m1);
                c0[v] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1[v], key0));
                c2[v] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3[v], key1));
                c1[v] = p1, c3[v] = p0;
            }
        }
        for (int v = 0; v < VECTORS; v++) {
            const __m256i low = _mm256_blend_epi32(c0[v], _mm256_slli_epi64(c1[v], 32), 0xAA);
            const __m256i high = _mm256_blend_epi32(c2[v], _mm256_slli_epi64(c3[v], 32), 0xAA);
            __m256i* to = reinterpret_cast<__m256i*>(words + 4 * (b + 4 * v));
            _mm256_storeu_si256(to, _mm256_unpacklo_epi64(low, high));
            _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(low, high));
        }
    }
    philox_plain(key, first + b, blocks - b, words + 4 * b);
}
#endif

// The words of elements start ... start + count - 1, at the place returned; `room` for count + 6.
const u32* philox_words(const Philox& key, i64 start, i64 count, u32* room) {
    const i64 first = start / 4, blocks = (start + count + 3) / 4 - first;
#if HAVE_AVX2
    if (avx2) philox_avx2(key, u64(first), blocks, room);
    else
#endif
        philox_plain(key, u64(first), blocks, room);
    return room + start % 4;
}

// ---- TernGrad: random ternary codes ---------------------------------------------------------------

// max |x|, and sums over up to 32 rows of 32 numbers of x and x * x, lane by lane, in float64.
float ternary_sums_plain(const float* x, i64 n, float largest, double* sum, double* square) {
    for (i64 i = 0; i < n; i++) {
        const double wide = x[i];
        sum[i % 32] += wide;
        square[i % 32] += wide * wide;
        largest = std::max(largest, std::fabs(x[i]));
    }
    return largest;
}

#if HAVE_AVX2
AVX2 float ternary_sums_avx2(const float* x, float largest, double* sum, double* square) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    __m256 most = _mm256_set1_ps(largest);
    for (int lane = 0; lane < 32; lane += 16) {
        __m256d s[4], q[4];
        for (int k = 0; k < 4; k++) s[k] = q[k] = _mm256_setzero_pd();
        for (int row = 0; row < 32; row++)
            for (int k = 0; k < 4; k += 2) {
                const __m256 v = _mm256_loadu_ps(x + 32 * row + lane + 4 * k);
                const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
                const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
                most = _mm256_max_ps(most, _mm256_and_ps(v, magnitude));
                s[k] = _mm256_add_pd(s[k], low);
                s[k + 1] = _mm256_add_pd(s[k + 1], high);
                q[k] = _mm256_add_pd(q[k], _mm256_mul_pd(low, low));
                q[k + 1] = _mm256_add_pd(q[k + 1], _mm256_mul_pd(high, high));
            }
        for (int k = 0; k < 4; k++) {
            _mm256_storeu_pd(sum + lane + 4 * k, s[k]);
            _mm256_storeu_pd(square + lane + 4 * k, q[k]);
        }
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, most);
    return *std::max_element(lanes, lanes + 8);
}
#endif

// The folded lanes of up to 32**4 elements to `sums` (32 of x, 32 of x * x); returns max |x|.
float ternary_branch(const float* x, i64 n, double* sums) {
    double memory[64 * Fold<double>::LEVELS], block[64];
    Fold<double> fold(memory, 64);
    float largest = 0;
    for (i64 at = 0; at < n; at += 1024) {
        std::fill(block, block + 64, 0.0);
#if HAVE_AVX2
        if (avx2 && n - at >= 1024)
            largest = ternary_sums_avx2(x + at, largest, block, block + 32);
        else
#endif
            largest = ternary_sums_plain(x + at, std::min<i64>(1024, n - at), largest, block, block + 32);
        fold.add(block);
    }
    std::memcpy(sums, fold.result(), 64 * sizeof(double));
    return largest;
}

struct Ternary {
    float level, scale;
    u8 digit(float x, u32 word) const {  // code + 1
        const float draw = float(word >> 8) * 5.9604644775390625e-8f;
        const bool hit = draw * scale < std::min(std::fabs(x), level);
        return u8(1 + hit * ((x > 0) - (x < 0)));
    }
};

#if HAVE_AVX2
AVX2 i64 ternary_digits_avx2(const float* x, i64 n, Ternary t, const u32* words, u8* digits) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    const __m256 level = _mm256_set1_ps(t.level), scale = _mm256_set1_ps(t.scale);
    const __m256 unit = _mm256_set1_ps(5.9604644775390625e-8f), zero = _mm256_setzero_ps();
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    i64 i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i code[4];
        for (int k = 0; k < 4; k++) {
            const __m256 v = _mm256_loadu_ps(x + i + 8 * k);
            const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + i + 8 * k));
            const __m256 draw = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(word, 8)), unit);
            const __m256 size = _mm256_min_ps(_mm256_and_ps(v, magnitude), level);
            const __m256 hit = _mm256_cmp_ps(_mm256_mul_ps(draw, scale), size, _CMP_LT_OQ);
            const __m256i positive = _mm256_castps_si256(_mm256_cmp_ps(v, zero, _CMP_GT_OQ));
            const __m256i negative = _mm256_castps_si256(_mm256_cmp_ps(v, zero, _CMP_LT_OQ));
            code[k] = _mm256_and_si256(_mm256_castps_si256(hit), _mm256_sub_epi32(negative, positive));
        }
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(code[0], code[1]),
                                                 _mm256_packs_epi32(code[2], code[3]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(digits + i),
                            _mm256_add_epi8(_mm256_permutevar8x32_epi32(bytes, order),
                                            _mm256_set1_epi8(1)));
    }
    return i;
}

AVX2 i64 ternary_pack_avx2(const u8* digits, i64 n, u8* data) {
    const __m256i pair = _mm256_set1_epi16(0x0401), quad = _mm256_set1_epi32(0x00100001);
    const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                           0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    i64 i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i d = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(digits + i));
        const __m256i bytes = _mm256_madd_epi16(_mm256_maddubs_epi16(d, pair), quad);
        const __m256i packed = _mm256_shuffle_epi8(bytes, first);
        put(data + i / 4, _mm256_extract_epi32(packed, 0));
        put(data + i / 4 + 4, _mm256_extract_epi32(packed, 4));
    }
    return i;
}

// out += table[digit] for whole groups of 32 digits; `bad` collects digits that are 3.
AVX2 i64 ternary_add_avx2(const u8* data, i64 n, const float* level, float* out, u32* bad) {
    const __m256 table = _mm256_setr_ps(level[0], level[1], level[2], 0, level[0], level[1], level[2], 0);
    const __m256i shift = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    i64 i = 0;
    for (; i + 32 <= n; i += 32) {
        const u64 word = get<u64>(data + i / 4), threes = word & word >> 1 & 0x5555555555555555;
        *bad |= u32(threes | threes >> 32);
        for (int k = 0; k < 4; k++) {  // permutevar reads two bits of each lane
            const __m256i digit = _mm256_srlv_epi32(_mm256_set1_epi32(int(word >> 16 * k)), shift);
            const __m256 v = _mm256_permutevar_ps(table, digit);
            _mm256_storeu_ps(out + i + 8 * k, _mm256_add_ps(_mm256_loadu_ps(out + i + 8 * k), v));
        }
    }
    return i;
}
#endif

enum Packing { TWOBIT, PLANAR, INT8, INT16 };

// The digits of elements at ... at + count - 1 of n, packed. TWOBIT: `at` is a multiple of 4.
void ternary_pack(const u8* digits, i64 at, i64 count, i64 n, int packing, u8* data) {
    i64 i = 0;
    if (packing == TWOBIT) {
        u8* to = data + at / 4;
#if HAVE_AVX2
        if (avx2) i = ternary_pack_avx2(digits, count, to);
#endif
        for (; i < count; i += 4) {
            u8 byte = 0;
            for (i64 k = i; k < std::min(i + 4, count); k++) byte |= u8(digits[k] << 2 * (k - i));
            to[i / 4] = byte;
        }
    } else if (packing == PLANAR) {
        const i64 quarter = n / 4 + 1;
        while (i < count) {
            const i64 q = (at + i) / quarter, from = (at + i) % quarter;
            const i64 run = std::min(count - i, quarter - from);
            for (i64 k = 0; k < run; k++) data[from + k] |= u8(digits[i + k] << 2 * q);
            i += run;
        }
    } else if (packing == INT8) {
        for (; i < count; i++) data[at + i] = u8(digits[i] - 1);
    } else {
        for (; i < count; i++) put(data + 2 * (at + i), int16_t(digits[i] - 1));
    }
}

// out += code * scale for elements at ... at + count - 1 of n; false if a digit is 3.
bool ternary_add(const u8* data, i64 at, i64 count, i64 n, int packing, float scale, float* out) {
    const float level[4] = {-1.0f * scale, 0.0f * scale, 1.0f * scale, 0.0f};
    i64 i = 0;
    u32 bad = 0;
    if (packing == TWOBIT) {
        const u8* from = data + at / 4;
#if HAVE_AVX2
        if (avx2) i = ternary_add_avx2(from, count, level, out, &bad);
#endif
        for (; i < count; i++) {
            const int digit = from[i / 4] >> 2 * (i % 4) & 3;
            bad |= digit == 3;
            out[i] += level[digit];
        }
    } else if (packing == PLANAR) {
        const i64 quarter = n / 4 + 1;
        while (i < count) {
            const i64 q = (at + i) / quarter, from = (at + i) % quarter;
            const i64 run = std::min(count - i, quarter - from);
            for (i64 k = 0; k < run; k++) {
                const int digit = data[from + k] >> 2 * q & 3;
                bad |= digit == 3;
                out[i + k] += level[digit];
            }
            i += run;
        }
    } else if (packing == INT8) {
        for (; i < count; i++) out[i] += float(int8_t(data[at + i])) * scale;
    } else {
        for (; i < count; i++) out[i] += float(get<int16_t>(data + 2 * (at + i))) * scale;
    }
    return !bad;
}

}  // namespace

// levels[0] = where x is clipped, levels[1] = the largest magnitude after that.
API void mp_ternary_scale(const float* x, i64 n, double clip, float* levels) {
    constexpr i64 BRANCH = 1 << 20;  // elements whose folded lanes are one row of the next fold
    const i64 branches = (n + BRANCH - 1) / BRANCH;
    thread_local std::vector<double> sums;
    thread_local std::vector<float> largest;
    if (i64(largest.size()) < branches) sums.resize(64 * branches), largest.resize(branches);
    double* const rows = sums.data();
    float* const most = largest.data();
    split(branches, 1, 1, [&](int, i64 begin, i64 end) {
        for (i64 b = begin; b < end; b++)
            most[b] = ternary_branch(x + b * BRANCH, std::min(BRANCH, n - b * BRANCH), rows + 64 * b);
    });
    levels[0] = INFINITY;
    levels[1] = branches ? *std::max_element(most, most + branches) : 0.0f;
    if (clip == 0 || n < 8) return;
    double memory[64 * Fold<double>::LEVELS], block[64], total[2] = {0, 0};
    Fold<double> fold(memory, 64);
    for (i64 b = 0; b < branches; b += 32) {
        std::fill(block, block + 64, 0.0);
        for (i64 k = b; k < std::min(b + 32, branches); k++)
            for (int lane = 0; lane < 64; lane++) block[lane] += rows[64 * k + lane];
        fold.add(block);
    }
    const double* lanes = fold.result();
    for (int lane = 0; lane < 32; lane++) total[0] += lanes[lane], total[1] += lanes[32 + lane];
    const double mean = total[0] / double(n), variance = total[1] / double(n) - mean * mean;
    const float level = float(clip * std::sqrt(std::max(variance, 0.0)));
    if (!(level > 0) || levels[1] * 1e-6f > level) return;
    levels[0] = level;
    levels[1] = std::min(levels[1], level);
}

API void mp_ternary_encode(const float* x, i64 n, float level, float scale, u64 seed, u32 rank,
                           u32 step, u32 bucket, i64 start, int packing, u8* data) {
    const Philox key{bucket, step, rank, u32(seed), u32(seed >> 32)};
    const Ternary t{level, scale};
    const i64 size = packing == PLANAR && n ? n / 4 + 1 : 0;
    if (packing == PLANAR) std::memset(data, 0, size);
    const auto encode = [&](int, i64 begin, i64 end) {
        constexpr i64 STEP = 1024;
        alignas(32) u32 room[STEP + 8];
        alignas(32) u8 digits[STEP];
        for (i64 at = begin; at < end; at += STEP) {
            const i64 count = std::min(STEP, end - at);
            const u32* words = philox_words(key, start + at, count, room);
            i64 i = 0;
#if HAVE_AVX2
            if (avx2) i = ternary_digits_avx2(x + at, count, t, words, digits);
#endif
            for (; i < count; i++) digits[i] = t.digit(x[at + i], words[i]);
            ternary_pack(digits, at, count, n, packing, data);
        }
    };
    if (packing == PLANAR) encode(0, 0, n);  // bytes are shared by far away elements
    else split(n, 1024, GRAIN / 4, encode);
    const u8 padding[4] = {0, 1, 2, 3};
    if (size) ternary_pack(padding, n, 4 - n % 4, n, PLANAR, data);
}

// out += or, if fresh, = the sum over packets of code * (weight * scale); INVALID for a digit of 3.
API i64 mp_ternary_decode(const u8* const* data, const float* scales, i64 packets, int packing,
                          float weight, float* out, i64 n, int fresh) {
    std::atomic<bool> bad{false};
    add_packets(packets, out, n, fresh, [&](i64 p, i64 at, i64 count, float* to) {
        if (!ternary_add(data[p], at, count, n, packing, weight * scales[p], to)) bad = true;
    });
    return bad ? INVALID : 0;
}
