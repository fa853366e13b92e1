// The elements of largest magnitude, exactly so many.
#pragma once

#include "common.h"

// int32 start + i of the `keep` elements of largest magnitude, ascending. `cut` is the least of
// these magnitudes; of those that are equal to it the ones of lower index are taken.
API void mp_topk_select(const float* x, i64 n, i64 keep, float cut, i64 start, u8* index) {
    constexpr i64 STEP = 64;
    i64 ties = keep;
    for (i64 at = 0; at < n; at += STEP) {
        int larger = 0;
        for (i64 i = at; i < std::min(n, at + STEP); i++) larger += std::fabs(x[i]) > cut;
        ties -= larger;
    }
    for (i64 at = 0; at < n; at += STEP) {
        int reached = 0;
        const i64 stop = std::min(n, at + STEP);
        for (i64 i = at; i < stop; i++) reached += std::fabs(x[i]) >= cut;
        for (i64 i = at; reached && i < stop; i++) {
            const float size = std::fabs(x[i]);
            if (size < cut || (size == cut && ties-- <= 0)) continue;
            put(index, u32(start + i));
            index += 4;
        }
    }
}
