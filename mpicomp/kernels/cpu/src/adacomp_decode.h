// AdaComp, decoding: entries of 8 or 16 bits, summed over packets.
#pragma once

#include "sums.h"

namespace {

// Reads the entries of one packet, up to some element after the other.
template <class T> struct Reader {
    const u8* data;
    i64 count, size;
    float quantum;
    i64 next = 0, start = 0, last = -1;  // entry; first element of its bin; element before it
    u64 wrong = 0;                       // not 0: entries that no encoder wrote

    // Adds +-quantum to the elements named below `stop`; out[0] is element `at`.
    void add(float* out, i64 at, i64 stop) {
        do {
#if HAVE_AVX2
            if (avx2) some(out, at, stop);
#endif
        } while (few(out, at, stop));
    }

    // At most eight entries, or 4096 where there are no vectors. False where it met `stop`.
    bool few(float* out, i64 at, i64 stop) {
        Reader r = *this;  // in registers
        const float level[2] = {-quantum, quantum};  // a table: signs are hard to predict
        const i64 most = std::min(r.count, r.next + (avx2 ? 8 : 4096));
        bool met = most == r.count;
        for (; r.next < most; r.next++) {
            const u32 entry = get<T>(r.data + r.next * i64(sizeof(T)));
            const i64 field = entry >> 2, end = entry >> 1 & 1, i = r.start + field;
            if (!end && field >= r.size - 1) {  // a run of empty bins
                r.wrong |= entry & 1;
                r.start += (field - r.size + 2) * r.size;
                continue;
            }
            if (i >= stop) {
                met = true;
                break;
            }
            r.wrong |= (field >= r.size) | (i <= r.last);
            if (i <= r.last) continue;  // may lie before `out`
            out[i - at] += level[entry & 1];
            r.last = i;
            r.start += r.size & -end;
        }
        *this = r;
        return !met;
    }

#if HAVE_AVX2
    // Eight entries at a time, as long as they are such as an encoder writes, no run is among them
    // and all stand before `stop`. An entry's place is that of the bin, which moves on behind each
    // last entry, and its field.
    AVX2 void some(float* out, i64 at, i64 stop) {
        const __m256i one = _mm256_set1_epi32(1), room = _mm256_set1_epi32(int(size - 1));
        const __m256i minus = _mm256_castps_si256(_mm256_set1_ps(-quantum));
        const __m256i step = _mm256_set1_epi32(int(size));
        const __m256i before = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
        Reader r = *this;  // in registers
        alignas(32) int place[8];
        alignas(32) float value[8];
        for (; r.next + 8 <= r.count && r.start < stop; r.next += 8) {
            const __m256i entry = eight(r.data + r.next * i64(sizeof(T)));
            const __m256i field = _mm256_srli_epi32(entry, 2);
            const __m256i end = _mm256_and_si256(_mm256_srli_epi32(entry, 1), one);
            __m256i bins = end;  // the sum of ends so far, first within halves
            bins = _mm256_add_epi32(bins, _mm256_slli_si256(bins, 4));
            bins = _mm256_add_epi32(bins, _mm256_slli_si256(bins, 8));
            const __m256i low = _mm256_permutevar8x32_epi32(bins, _mm256_set1_epi32(3));
            bins = _mm256_add_epi32(bins, _mm256_blend_epi32(_mm256_setzero_si256(), low, 0xF0));
            const __m256i passed = _mm256_mullo_epi32(_mm256_sub_epi32(bins, end), step);
            const __m256i index = _mm256_add_epi32(
                _mm256_add_epi32(passed, field), _mm256_set1_epi32(int(r.start - at)));
            const __m256i prior = _mm256_blend_epi32(
                _mm256_permutevar8x32_epi32(index, before),
                _mm256_set1_epi32(int(std::max<i64>(r.last - at, -1))), 1);
            const __m256i fine = _mm256_and_si256(
                _mm256_cmpgt_epi32(_mm256_add_epi32(room, end), field),
                _mm256_cmpgt_epi32(index, prior));
            _mm256_store_si256(reinterpret_cast<__m256i*>(place), index);
            if (_mm256_movemask_epi8(fine) != -1 || place[7] >= stop - at) break;
            const __m256i v = _mm256_xor_si256(_mm256_slli_epi32(entry, 31), minus);
            _mm256_store_ps(value, _mm256_castsi256_ps(v));
            for (int k = 0; k < 8; k++) out[place[k]] += value[k];
            r.last = at + place[7];
            r.start += size * _mm256_extract_epi32(bins, 7);
        }
        *this = r;
    }

    AVX2 static __m256i eight(const u8* from) {
        if (sizeof(T) == 1) return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(get<i64>(from)));
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
#endif

    // Is all read, and does it end with the last element of a bin?
    bool right() const {
        if (!count) return true;
        const u32 entry = get<T>(data + (count - 1) * i64(sizeof(T)));
        return !wrong && next == count && (entry & 2) && finite(&quantum, 1);
    }
};

template <class T>
i64 adacomp_decode(const u8* const* data, const i64* counts, const float* scales, i64 packets,
                   i64 size, float weight, float* out, i64 n, bool fresh) {
    std::vector<Reader<T>> all;
    for (i64 p = 0; p < packets; p++) all.push_back({data[p], counts[p], size, weight * scales[p]});
    sum_chunks(out, 0, n, fresh, n >= stream_from, [&](i64 at, i64 stop, float* to) {
        for (auto& reader : all) reader.add(to, at, stop);
    });
    const auto right = [](const Reader<T>& reader) { return reader.right(); };
    return std::all_of(all.begin(), all.end(), right) ? 0 : INVALID;
}

}  // namespace

// out += or, if fresh, = the sum over packets of +-(weight * scale) at the elements named; `counts`
// in entries. INVALID for entries that no encoder wrote.
API i64 mp_adacomp_decode(const u8* const* data, const i64* counts, const float* scales,
                          i64 packets, i64 size, int width, float weight, float* out, i64 n,
                          int fresh) {
    const auto decode = width == 1 ? adacomp_decode<u8> : adacomp_decode<u16>;
    return decode(data, counts, scales, packets, size, weight, out, n, fresh);
}
