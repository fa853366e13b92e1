// What all kernels share: types, the choice of instructions, threads, large results.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_AVX2 1
#define AVX2 __attribute__((target("avx2,f16c")))
#define AVX512 __attribute__((target("avx2,avx512f,avx512vl")))
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

constexpr int MOST_THREADS = 64;
constexpr i64 CHUNK = 4096;      // elements of output that several packets are summed into at once
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

inline i64 up_to(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- instructions and threads -------------------------------------------------------------------

// 0 = plain loops only, 1 = AVX2, 2 = AVX-512 in the one place where it pays (Philox).
int best_vectors() {
#if HAVE_AVX2
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") ? 2 : 1;
#else
    return 0;
#endif
}

bool avx2 = best_vectors() >= 1, avx512 = best_vectors() == 2;
int threads = 1;
i64 grain = 1 << 17;       // a thread is not worth starting for fewer elements
i64 stream_from = 1 << 20;  // arrays of so many elements are written past the caches

// f(part, begin, end) over all of 0 ... n - 1, in as many parts as there are threads and at least
// `least` long; parts begin at multiples of `multiple`. Threads live for one call, so a fork in
// between loses none.
template <class F> void split(i64 n, i64 multiple, i64 least, const F& f) {
    const i64 parts = std::min<i64>(threads, n / std::max<i64>(least, 1));
    if (parts <= 1) return f(0, i64(0), n);
    const i64 each = up_to((n + parts - 1) / parts, multiple);
    std::vector<std::thread> team;
    for (i64 part = 1; part * each < n; part++) {
        const i64 begin = part * each, end = std::min(n, begin + each);
        try {
            team.emplace_back([&f, part, begin, end] { f(int(part), begin, end); });
        } catch (const std::system_error&) {  // no thread to be had
            f(int(part), begin, end);
        }
    }
    f(0, i64(0), std::min(n, each));
    for (auto& thread : team) thread.join();
}

// ---- memory -------------------------------------------------------------------------------------

// Asks for n floats that will be read soon.
inline void fetch(const float* x, i64 n) {
    for (i64 i = 0; i < n; i += 16) __builtin_prefetch(x + i);
}

// Elements until `to` lies at 32 bytes, as streaming stores need it.
inline i64 until_aligned(const float* to, i64 n) {
    return std::min<i64>(n, (32 - reinterpret_cast<uintptr_t>(to) % 32) % 32 / 4);
}

// Elements until `to` lies at the next cache line.
inline i64 until_line(const float* to, i64 n) {
    return std::min<i64>(n, (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64 / 4);
}

#if HAVE_AVX2
// Asks for the 32 elements that lie a page behind x: the memory unit follows a stream only to the
// end of its page, and a tenth of all reading time is its finding the next.
inline void next_page(const float* x) {
    _mm_prefetch(reinterpret_cast<const char*>(x + 1024), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(x + 1040), _MM_HINT_T1);
}

AVX2 inline void store(float* to, __m256 v, bool stream) {
    if (stream) _mm256_stream_ps(to, v);
    else _mm256_storeu_ps(to, v);
}

AVX2 void copy_avx2(const float* from, float* to, i64 n, bool stream) {
    i64 i = stream ? until_aligned(to, n) : 0;
    std::memcpy(to, from, 4 * i);
    for (; stream && i + 8 <= n; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
    std::memcpy(to + i, from + i, 4 * (n - i));
    if (stream) _mm_sfence();
}
#endif

void copy(const float* from, float* to, i64 n, bool stream) {
#if HAVE_AVX2
    if (avx2) return copy_avx2(from, to, n, stream);
#endif
    std::memcpy(to, from, 4 * n);
}

// add(at, stop, to) for one chunk after the other of elements begin ... end - 1, where to[0] is
// element `at` of `out`. If `fresh`, that is a chunk of zeros in cache, which then goes to `out`.
template <class A>
void sum_chunks(float* out, i64 begin, i64 end, bool fresh, bool stream, const A& add) {
    alignas(64) float chunk[CHUNK];
    for (i64 at = begin; at < end; at += CHUNK) {
        const i64 stop = std::min(end, at + CHUNK);
        if (fresh) std::fill(chunk, chunk + (stop - at), 0.0f);
        add(at, stop, fresh ? chunk : out + at);
        if (fresh) copy(chunk, out + at, stop - at, stream);
    }
}

// What decode(packet, begin, count, out) adds, summed over packets, in chunks.
template <class D> void add_packets(i64 packets, float* out, i64 n, bool fresh, const D& decode) {
    split(n, CHUNK, grain, [&](int, i64 begin, i64 end) {
        sum_chunks(out, begin, end, fresh, n >= stream_from, [&](i64 at, i64 stop, float* to) {
            for (i64 p = 0; p < packets; p++) decode(p, at, stop - at, to);
        });
    });
}

}  // namespace

API int mp_version() { return 6; }  // counts changes of the functions marked API: library.py

API int mp_vectors(int most) {  // most < 0 asks
    if (most >= 0) {
        avx2 = std::min(most, best_vectors()) >= 1;
        avx512 = std::min(most, best_vectors()) == 2;
    }
    return avx2 + avx512;
}

API void mp_limits(i64 grain_, i64 stream) { grain = grain_, stream_from = stream; }

API int mp_threads(int count) {  // count < 1 asks
    if (count >= 1) threads = std::min(count, MOST_THREADS);
    return threads;
}
